// The list of all cases: searched, filtered, sorted, opened. Every text is set as text; the probes' HTML was escaped
// where it was made. Nothing is fetched: the data lie in the page, packed.
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const controls = $("controls"), table = $("cases"), more = $("more"), count = $("count");
if (!table) return;
const PAGE = 200; // rows that are shown at first
const [NEW, PARAPHRASES, KEPT] = [0, 2, 4]; // places of a sum in a score, its number of probes behind it
let data, shown = PAGE, sort = { by: "order", down: false };
const chunks = new Map();

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
function element(tag, about = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}
const protocol = () => document.querySelector("input[name=protocol]:checked")?.value;
const score = (row, method) => row.scores[protocol()]?.[method] ?? null;
const chosen = () => ($("method").value === "" ? data.methods.map((_, i) => i) : [Number($("method").value)]);

const tests = {
  all: () => true,
  missed: (row, m) => { const s = score(row, m); return s !== null && s[NEW] < s[NEW + 1]; },
  paraphrases: (row, m) => { const s = score(row, m); return s !== null && s[PARAPHRASES] < s[PARAPHRASES + 1]; },
  damage: (row, m) => { const s = score(row, m); return s !== null && s[KEPT] < s[KEPT + 1]; },
  lost: (row, m) => row.lost?.[protocol()]?.[m] === 1,
  failed: (row, m) => row.failed[m] === 1,
  well: (row, m) => { const s = score(row, m); return s !== null && [NEW, PARAPHRASES, KEPT].every((i) => s[i] >= s[i + 1]); },
};
function found() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const relation = $("relation")?.value ?? "", wanted = $("show").value, methods = chosen();
  const rows = data.rows.filter((row) =>
    (relation === "" || row.relation === Number(relation)) &&
    words.every((word) => row.text.includes(word)) &&
    (wanted === "well" ? methods.every((m) => tests.well(row, m)) : methods.some((m) => tests[wanted](row, m))));
  const value = { order: (row) => row.number, request: (row) => row.request.join("").toLowerCase() }[sort.by] ??
    ((row) => { const s = score(row, sort.by); return s === null ? -1 : s[NEW] * 1e6 + s[PARAPHRASES] * 1e3 + s[KEPT]; });
  const keys = new Map(rows.map((row) => [row, value(row)]));
  const order = (a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a.number - b.number);
  return rows.sort((a, b) => (sort.down ? -order(a, b) : order(a, b)));
}
function share(sum, of, title) {
  const text = of === 1 && (sum === 0 || sum === 1) ? (sum ? "✓" : "✗") : `${Number.isInteger(sum) ? sum : sum.toFixed(1)}/${of}`;
  return element("span", { class: `score ${sum >= of ? "ok" : "no"}`, title }, text);
}
function cell(row, method) {
  const made = element("td", { "data-label": data.methods[method] }), s = score(row, method);
  if (row.failed[method]) made.append(element("span", { class: "score no" }, "failed"));
  if (s) for (const [place, title] of [[NEW, "new answer"], [PARAPHRASES, "paraphrases"], [KEPT, "other facts kept"]])
    if (s[place + 1]) made.append(share(s[place], s[place + 1], title));
  if (!made.childNodes.length) made.append("–");
  return made;
}
function line(row, methods) {
  const [head, subject, tail] = row.request;
  const open = element("button", { type: "button", "aria-expanded": "false" }, head, element("u", {}, subject), tail);
  const request = element("td", { class: "request" }, open, " ");
  if (row.old) request.append(element("del", {}, row.old), " → ");
  request.append(element("ins", {}, row.new));
  const made = element("tr", { class: "case" }, request, ...methods.map((m) => cell(row, m)));
  made.addEventListener("click", (event) => {
    if (event.target === open || !getSelection().toString()) toggle(made, open, row);
  });
  return made;
}
async function toggle(made, open, row) {
  const expanded = open.getAttribute("aria-expanded") === "true";
  open.setAttribute("aria-expanded", String(!expanded));
  if (expanded) return made.nextElementSibling?.classList.contains("detail") && made.nextElementSibling.remove();
  const inside = element("td", { class: "open", colspan: String(made.cells.length) });
  made.after(element("tr", { class: "detail" }, inside));
  const chunk = Math.floor(row.number / data.chunk);
  if (!chunks.has(chunk)) chunks.set(chunk, unpack(`chunk-${chunk}`));
  inside.innerHTML = (await chunks.get(chunk))[row.number % data.chunk];
  inside.prepend(element("div", { class: "note" }, row.id));
}
function header(methods) {
  const button = (by, text) => {
    const made = element("button", { type: "button", "data-by": String(by) }, text);
    made.addEventListener("click", () => {
      sort = { by, down: sort.by === by ? !sort.down : false };
      draw();
      table.tHead.querySelector(`[data-by="${by}"]`).focus();
    });
    const state = sort.by !== by ? "none" : sort.down ? "descending" : "ascending";
    return element("th", { scope: "col", "aria-sort": state }, made);
  };
  const names = methods.map((m) => button(m, data.methods[m]));
  table.tHead.replaceChildren(element("tr", {}, button("request", "request"), ...names));
}
function fit() { // a table that is wider than the page scrolls in itself, its head kept
  table.classList.remove("wide");
  table.classList.toggle("wide", table.getBoundingClientRect().width > table.parentElement.clientWidth + 1);
}
function draw() {
  const rows = found(), methods = chosen(), body = table.tBodies[0];
  header(methods);
  body.replaceChildren(...rows.slice(0, shown).map((row) => line(row, methods)));
  if (!rows.length) body.append(element("tr", {}, element("td", { class: "empty", colspan: "9" }, "No case is like that.")));
  body.style.minHeight = "";
  fit();
  more.hidden = rows.length <= shown;
  more.textContent = `Show all ${rows.length.toLocaleString("en")}`;
  count.textContent = `${rows.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} cases`;
}
async function start() {
  if (typeof DecompressionStream === "undefined") {
    count.textContent = "This browser cannot unpack the cases (no DecompressionStream): open the page in a newer one.";
    return;
  }
  data = await unpack("index");
  data.rows.forEach((row, number) => {
    row.number = number;
    row.text = [row.id, ...row.request, row.old, row.new, ...row.wrote].join(" ").toLowerCase();
  });
  for (const input of controls.querySelectorAll("input, select"))
    input.addEventListener("input", () => { shown = PAGE; draw(); });
  for (const input of document.querySelectorAll("input[name=protocol]")) input.addEventListener("change", draw);
  more.addEventListener("click", () => { shown = Infinity; draw(); });
  controls.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", fit);
  draw();
}
start();
})();
