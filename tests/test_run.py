"""The flags all recipes share, and those of an earlier run."""

import dataclasses
import json

import pytest

from minillama.errors import UserError
from minillama.lora import LoraConfig
from minillama.optim import OptimConfig
from minillama.run import saved_flags


@dataclasses.dataclass(frozen=True)
class Flags:
    model: str
    config: str | None = None
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()


def test_flags_of_an_earlier_run(tmp_path, monkeypatch):
    flags = Flags("m", optim=OptimConfig(lr=0.5), lora=LoraConfig(targets=("o_proj",)))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"flags": dataclasses.asdict(flags)}))
    monkeypatch.setattr("sys.argv", ["x", "--optim.lr", "1", "--config", str(file)])
    assert saved_flags(Flags) == flags
    file.write_text(json.dumps({"flags": {"model": "m", "lora": {}, "optim": {"speed": 1}}}))
    with pytest.raises(UserError, match=r"no flag --optim.speed"):
        saved_flags(Flags)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"is not the run\.json of a run"):
        saved_flags(Flags)
    monkeypatch.setattr("sys.argv", ["x", "--optim.lr", "1"])
    assert saved_flags(Flags) is None
