"""What the server that children fork from (conftest.py) does once: imports, and the first use of tyro and matplotlib."""

import contextlib
import gc
import io
import runpy
import sys
from pathlib import Path

import conftest  # noqa: F401
import matplotlib.figure
import peft  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

matplotlib.figure.Figure().savefig(io.BytesIO())
for recipe in ("lora", "full", "llama_adapter"):
    script = Path(__file__).parents[1] / f"recipes/{recipe}_fsdp.py"
    sys.argv = [str(script), "--no-such-flag"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]  # it reads the environment, in which tests have settings of their own, when it is imported
gc.collect()
gc.freeze()  # a child's collections neither look at all of it nor copy its pages
