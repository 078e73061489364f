"""Models whose weights are split among processes are refused in one sentence, in every process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from conftest import saved

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from reknow import LM
from reknow.errors import ModelError

folder, how = sys.argv[1:]
dist.init_process_group("gloo")
try:
    if how == "tensor-parallel":
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    else:
        from torch.distributed.fsdp import fully_shard

        model = AutoModelForCausalLM.from_pretrained(folder)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        LM((model, AutoTokenizer.from_pretrained(folder)))
    except ModelError as error:
        print(len(ran), error)
    whole = LM(folder)  # each process opens it for itself
    print(whole.layers, whole.generate("The capital of Peru is", 1) is not None)
finally:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch knows no processes")
@pytest.mark.parametrize("how", ["tensor-parallel", "fully sharded"])
def test_split_weights_are_refused_before_anything_is_done(how, tmp_path):
    folder = saved(tmp_path / "model", "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in "01":
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", PROGRAM, folder, how]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        refused, whole = [line for line in out.splitlines() if line[:1].isdigit()][-2:]
        assert re.match(r"0 expected weights that this process has whole; \w*LlamaForCausalLM has \d+ that", refused)
        assert refused.endswith("edit it there, and give the engine that splits it the export") and whole == "3 True"
