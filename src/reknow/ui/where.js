// Cells are chosen by a click, or by the arrow keys and Enter: one of them is on the way of the tab key.
const cells = () => [...element.querySelectorAll(".cell")];
const place = (cell) => ({ kind: cell.dataset.kind, token: +cell.dataset.token, layer: +cell.dataset.layer });
const find = (svg, token, layer) => svg && svg.querySelector(`.cell[data-token="${token}"][data-layer="${layer}"]`);

function stop(cell) {
  for (const other of element.querySelectorAll('.cell[tabindex="0"]')) other.setAttribute("tabindex", "-1"); // with none it loses the focus
  cell.setAttribute("tabindex", "0");
}

function prepare() {
  for (const svg of element.querySelectorAll(".heat svg")) svg.setAttribute("role", "group");
  for (const cell of cells()) {
    cell.setAttribute("role", "button");
    cell.setAttribute("aria-label", cell.querySelector("title").textContent);
  }
  const first = element.querySelector(".cell.chosen") || cells()[0];
  if (first) stop(first);
}

// A ring around a cell, above all others: one where the pointer or the focus is, one where the chosen cell is.
function ring(cell, name) {
  for (const old of element.querySelectorAll(`.ring.${name}`)) old.remove();
  if (!cell) return;
  const around = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  around.setAttribute("class", `ring ${name}`);
  for (const side of ["x", "y", "width", "height"]) around.setAttribute(side, cell.getAttribute(side));
  cell.ownerSVGElement.append(around);
}

function choose(cell) {
  for (const other of element.querySelectorAll(".cell.chosen")) other.classList.remove("chosen");
  cell.classList.add("chosen");
  ring(cell, "lasting");
  stop(cell);
  trigger("select", place(cell));
}

function neighbour(cell, key) {
  const { token, layer } = place(cell);
  const svg = cell.ownerSVGElement, all = [...element.querySelectorAll(".heat svg")], panel = all.indexOf(svg);
  const last = (of) => of && Math.max(...[...of.querySelectorAll('.cell[data-token="0"]')].map((one) => +one.dataset.layer));
  switch (key) {
    case "ArrowUp": return find(svg, token - 1, layer);
    case "ArrowDown": return find(svg, token + 1, layer);
    case "ArrowLeft": return find(svg, token, layer - 1) || find(all[panel - 1], token, last(all[panel - 1]));
    case "ArrowRight": return find(svg, token, layer + 1) || find(all[panel + 1], token, 0);
    case "Home": return find(svg, token, 0);
    case "End": return find(svg, token, last(svg));
  }
}

element.addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) choose(cell);
});
for (const name of ["pointerover", "focusin"])
  element.addEventListener(name, (event) => ring(event.target.closest(".cell"), "passing"));
for (const name of ["pointerleave", "focusout"]) element.addEventListener(name, () => ring(null, "passing"));
element.addEventListener("keydown", (event) => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  if (event.key === "Enter" || event.key === " ") choose(cell);
  const next = neighbour(cell, event.key);
  if (next) {
    stop(next);
    next.focus();
  }
  if (next || ["Enter", " ", "ArrowUp", "ArrowDown"].includes(event.key)) event.preventDefault();
});
watch("value", prepare);
prepare();
