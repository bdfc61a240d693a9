"""The branches for CUDA, executed on tensors that only seem to be there: no wrong argument, dtype, shape or device.

What they compute is checked by tools/gpu_check.py on a real GPU.
"""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, random_model
from fake_cuda import FakeCudaProcess, answering
from test_packing import documents_of

from minillama.adapters.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillama.adapters.lora import LoraConfig, apply_lora, lora_off
from minillama.data.batch import collate
from minillama.data.packing import pack
from minillama.hardware.kernels import KernelsConfig, choose_kernels, compile_blocks
from minillama.model.attention import BACKENDS
from minillama.model.config import LlamaConfig
from minillama.model.llama import Llama
from minillama.model.quant import QuantizedLinear, apply_quantization, dequantize
from minillama.parallel.initialise import materialise
from minillama.parallel.sharding import FsdpConfig, set_dtypes
from minillama.training.dpo import DpoConfig, DpoLoss, FrozenWeights
from minillama.training.optim import LossScaler, OptimConfig, make_optimizer
from minillama.training.step import train_step

CUDA = torch.device("cuda")
LENGTHS = [300, 1, 150, 61]


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    if torch.cuda._is_compiled() and not torch.cuda.is_available():
        pytest.skip("a PyTorch built for CUDA asks the driver, and there is no GPU")
    process = FakeCudaProcess(tmp_path_factory.mktemp("stand-in"))
    yield process
    process.close()


def attend(mode, name, dtype):
    q, k, v = (torch.randn(1, 512, h, 64, device=CUDA, dtype=dtype, requires_grad=True) for h in (8, 2, 2))
    out = BACKENDS[name](LENGTHS, CUDA).attend(q, k, v)
    out.sum().backward()
    found = [(tuple(x.shape), x.dtype, x.device.type) for x in (out, q.grad, k.grad, v.grad)]
    return found, mode.reads, mode.copies, mode.called("torch_attn::_varlen_attn")


@pytest.mark.parametrize(
    "name, dtype",
    [
        (n, d)
        for n in BACKENDS
        for d in (torch.bfloat16, torch.float32)
        if d != torch.float32 or n not in ("flash", "varlen")
    ],
)
def test_attention(fake, name, dtype):
    found, reads, copies, calls = fake(attend, name, dtype)
    assert found == [((1, 512, h, 64), dtype, "cuda") for h in (8, 8, 2, 2)]
    assert reads == []
    assert all(pinned and non_blocking for _, pinned, non_blocking in copies), copies
    assert len(calls) == (name == "varlen")


def train(mode, kind, attention, precision, compiled=False):
    kind, _, preference = kind.partition(" ")
    with torch.device("meta"):
        wide = {"hidden_size": 64, "intermediate_size": 128} if kind == "nf4" else {}
        model = Llama(LlamaConfig.from_dict(TINY | wide)).requires_grad_(kind == "full")
    if kind == "nf4":
        apply_lora(apply_quantization(model, "nf4"), LoraConfig(rank=4, dora=True))
    if kind == "lora":
        apply_lora(model, LoraConfig(rank=4, targets=("v_proj", "lm_head")))
    if kind == "adapter":
        apply_llama_adapter(model, LlamaAdapterConfig(prompt_len=5, layers=2))
    fsdp = FsdpConfig(precision=precision)
    set_dtypes(model, fsdp)
    with answering():
        choose_kernels(model, KernelsConfig(attention=attention, compile=compiled), fsdp.compute_dtype, "cuda")
    if compiled:
        compile_blocks(model)
    materialise(model, "cuda")
    optimizer = make_optimizer(model.parameters(), OptimConfig(weight_decay=0.1))
    scaler = LossScaler() if precision == "fp16" else None
    packed = pack(documents_of([20, 30, 14, 40, 24]), 64, 0)
    loss_function = None
    if preference:
        packed = pack(replace(documents_of([20, 30, 14, 40]), per_row=2), 64, 0)
        loss_function = DpoLoss(DpoConfig(), lora_off if kind == "lora" else FrozenWeights(model), "cuda")
    batches = [collate(packed, [p], 0, "cuda") for p in range(len(packed))]
    collated = list(mode.copies)
    loss, norm = train_step(
        model.train(), optimizer, batches, clip_norm=1.0, scaler=scaler, loss_function=loss_function
    )
    assert loss.device.type == norm.device.type == "cuda" and loss.dtype == norm.dtype == torch.float32
    return mode.reads, collated, mode.copies[len(collated) :]


@pytest.mark.parametrize(
    "kind, attention, precision",
    [
        ("full", "auto", "mixed"),
        ("full", "auto", "bf16"),
        ("full", "auto", "fp32"),
        ("lora", "auto", "fp16"),
        ("lora", "math", "mixed"),
        ("lora", "sdpa", "mixed"),
        ("adapter", "auto", "mixed"),
        ("nf4", "auto", "mixed"),
        ("lora dpo", "auto", "mixed"),
        ("full dpo", "auto", "fp16"),
    ],
)
def test_a_training_step_waits_for_nothing(fake, kind, attention, precision):
    reads, collated, copies = fake(train, kind, attention, precision)
    assert collated and all(pinned and non_blocking for _, pinned, non_blocking in collated), collated
    assert all(non_blocking for _, _, non_blocking in copies), copies
    if precision == "fp16":  # whether the norm is finite decides whether the step is made
        [place] = reads
        assert place.startswith("step.py") and "isfinite" in place
    else:
        assert reads == []


def quantised(mode, kind):
    layer = QuantizedLinear(torch.nn.Linear(192, 96, bias=False, device="meta"), kind).to_empty(device=CUDA)
    layer.fill(torch.randn(96, 192, device=CUDA))
    mode.reads.clear()
    mode.copies.clear()
    found = dequantize(layer.weight, 192, layer.tables, torch.bfloat16)
    return tuple(found.shape), found.dtype, found.device.type, mode.reads, mode.copies


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dequantising_waits_for_nothing(fake, kind):
    assert fake(quantised, kind) == ((96, 192), torch.bfloat16, "cuda", [], [])


def compiled(mode, kind, attention, precision):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    reads, _, _ = train(mode, kind, attention, precision, compiled=True)
    return reads, counters["frames"]["total"]


@pytest.mark.parametrize("attention, precision", [("varlen", "mixed"), ("flex", "fp32")])
def test_compiled_blocks(fake, attention, precision):
    reads, compilations = fake(compiled, "full", attention, precision)
    assert reads == [] and 1 <= compilations <= 2


def written_out(mode):
    """What the operator of math does on a device, where calling it would only ask for the shapes of its result."""
    from minillama.model import blockwise

    results = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k, v = (torch.randn(512, h, 64, device=CUDA, dtype=dtype) for h in (8, 2, 2))
        bounds = torch.tensor([0, 300, 301, 451, 512])
        out = blockwise.blockwise_attention._init_fn(q, k, v, bounds)
        results += [out, *blockwise.blockwise_attention_backward._init_fn(out, q, k, v, bounds)]
    return [(tuple(x.shape), x.dtype, x.device.type) for x in results], mode.reads, mode.copies


def test_attention_written_out(fake):
    found, reads, copies = fake(written_out)
    half, other, whole = torch.bfloat16, torch.float16, torch.float32
    assert found == [((512, h, 64), dtype, "cuda") for dtype in (half, other, whole) for h in (8, 8, 2, 2)]
    assert reads == copies == []


def losses(mode, weight_trains):
    from minillama.model.loss import linear_cross_entropy

    hidden = torch.randn(1, 9000, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=weight_trains)
    low = torch.randn(1, 9000, 8, device=CUDA, requires_grad=True)
    up = torch.randn(32000, 8, device=CUDA, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(9000)[None], low, up)
    products = [shapes[0] for shapes in mode.called("aten::mm.out") if shapes[1] == (64, 32000)]
    (loss / 9000).backward()
    found = [(x.grad.shape == x.shape, x.grad.dtype) for x in (hidden, low, up, weight) if x.requires_grad]
    return products, loss.dtype, found, mode.reads


@pytest.mark.parametrize("weight_trains", [False, True])
def test_loss(fake, weight_trains):
    products, dtype, gradients, reads = fake(losses, weight_trains)
    assert [rows for rows, _ in products] == [4096, 4096, 808]  # 4 bytes x 4194 x 32000 would be 512 MiB
    assert dtype == torch.float32 and reads == []
    of_weight = [(True, torch.bfloat16)] if weight_trains else []
    assert gradients == [(True, torch.bfloat16), (True, torch.float32), (True, torch.float32), *of_weight]


def optimizer(mode, dtype, moments):
    from minillama.training.optim import CompensatedAdamW

    size = 2**22 + 5
    parameter = torch.nn.Parameter(torch.zeros(size, device=CUDA, dtype=dtype))
    adamw = CompensatedAdamW([parameter], lr=1e-3, weight_decay=0.1, moments=moments)
    parameter.grad = torch.ones_like(parameter)
    adamw.step()
    other = CompensatedAdamW([parameter], lr=1e-3, moments=moments)
    other.load_state_dict(adamw.state_dict())
    state = {key: (value.dtype, value.device.type) for key, value in other.state[parameter].items()}
    return [shapes[0] for shapes in mode.called("aten::sqrt")], state, mode.reads


@pytest.mark.parametrize("dtype, moments", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_optimizer(fake, dtype, moments):
    parts, state, reads = fake(optimizer, dtype, moments)
    assert parts == [(2**22,), (5,)] and reads == []
    assert state.pop("step") == (torch.float32, "cpu")
    remainder = {"remainder": (torch.bfloat16, "cuda")} if dtype == torch.bfloat16 else {}
    assert state == {key: (moments, "cuda") for key in ("exp_avg", "exp_avg_sq")} | remainder


def answer(mode, folder):
    """A base on the device that answers two prompts."""
    from minillama.inference.generate import stream
    from minillama.inference.load import load_model

    with (
        answering(),
        patch("minillama.formats.hf.ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1)),
    ):  # fake tensors are not for many
        model = load_model(folder, "cuda")
    answers = list(stream(model, [[1, 2, 3], [4]], max_new_tokens=3))
    sampled = list(stream(model, [[1, 2, 3]], max_new_tokens=2, temperature=0.7, top_k=5, top_p=0.9))
    parameter = next(model.parameters())
    return (parameter.dtype, parameter.device.type), answers, sampled


def test_loading_and_generating(fake, tiny_folder):
    (dtype, device), answers, sampled = fake(answer, tiny_folder)
    assert device == "cuda" and dtype == torch.bfloat16
    assert answers == [[1, 1]] * 3 and sampled == [[1]] * 2


def logged(mode, folder):
    """Metrics, profiler, evaluation and prefetching of a run on the device."""
    from minillama.hardware.benchmark import matmul_rate
    from minillama.parallel.memory import peak_memory_gib
    from minillama.training.config import RunConfig
    from minillama.training.metrics import Metrics
    from minillama.training.out_of_memory import held_bytes
    from minillama.training.plan import EvalConfig, Progress, TrainConfig, eval_batches, prefetched, steps
    from minillama.training.step import evaluate

    config = RunConfig(Path("none"), Path(folder), fsdp=FsdpConfig(precision="fp32"))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(TINY))
    model.attention = BACKENDS["flex"]
    materialise(model, "cuda")
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    packed = pack(documents_of([20, 30, 14, 40, 24]), 64, 0)
    settings = TrainConfig(batch_size=1, epochs=2)
    metrics = Metrics(config.output_dir, config.log, model, "cuda", torch.float32, 4, Progress(packs_per_step=1))
    ready_made = [collate(packed, [p], 0, "cuda") for p in range(len(packed))]
    with answering(available=False) as told:
        plan = steps(packed, settings, 0, 0, 1, Progress(packs_per_step=1))
        for step, ready in prefetched(plan, lambda step: [ready_made[int(p)] for [p] in step.micro_batches]):
            with metrics.waiting():
                batches = ready.result()
            metrics.step(step, 1e-3, *train_step(model, optimizer, batches), batches)
        held = held_bytes(list(model.parameters()), optimizer, "cuda")
    metrics.evaluation(4, evaluate(model, eval_batches(packed, EvalConfig(), 0, "cuda", 0, 1)))
    metrics.close()
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return lines, told.device, held, peak_memory_gib("cuda"), matmul_rate("cuda", torch.bfloat16)


def test_a_run_is_logged(fake, tmp_path):
    lines, devices, held, peak, rate = fake(logged, tmp_path)
    assert len(lines) == 5
    assert devices == [0]  # the thread that loads is told the process's device
    size = 4 * Llama(LlamaConfig.from_dict(TINY)).lm_head.weight.numel()
    assert held["parameters"] > 2 * size and held["optimizer state"] > 2 * held["parameters"]
    assert held["reserved but not allocated"] == 2**30 and sum(held.values()) == 3 * 2**30
    assert peak == 0 and rate > 0


def kernels(mode, capability, dtype, attention="auto", compile=False):
    from minillama.errors import UserError

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(TINY))
    with answering(capability):
        try:
            return choose_kernels(model, KernelsConfig(attention=attention, compile=compile), dtype, "cuda").split()[0]
        except UserError as error:
            return str(error)


@pytest.mark.parametrize(
    "capability, dtype, attention, wanted",
    [
        ((9, 0), torch.bfloat16, "auto", "varlen"),
        ((8, 0), torch.float16, "auto", "varlen"),
        ((8, 0), torch.float32, "auto", "flex"),
        ((7, 5), torch.float16, "auto", "flex"),
        ((8, 0), torch.bfloat16, "flash", "flash"),
        ((7, 5), torch.float16, "varlen", "--kernels.attention varlen needs"),
        ((7, 5), torch.float16, "flash", "--kernels.attention flash needs"),
        ((8, 0), torch.float32, "varlen", "--kernels.attention varlen needs"),
    ],
)
def test_the_kernels_that_a_device_can_compute(fake, capability, dtype, attention, wanted):
    assert fake(kernels, capability, dtype, attention).startswith(wanted)


def strategy(mode, gibibytes):
    from minillama.parallel.sharding import choose_strategy

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(TINY)).requires_grad_(False)
    apply_lora(model, LoraConfig(rank=4))
    with answering(gibibytes=gibibytes):
        return choose_strategy(model, FsdpConfig(), "cuda").strategy


def test_the_strategy_that_fits_a_device(fake):
    assert fake(strategy, 80) == "no-shard" and fake(strategy, 1e-4) == "full-shard"


def joined(mode, devices, local_rank, visible=None):
    """What process_group says of so many devices; it cannot go further than to NCCL, which is not there."""
    import os

    from minillama.parallel.processes import process_group

    given = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_rank + 1)}
    given |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    wanted = []
    with (
        answering(devices=devices) as told,
        patch.dict(os.environ, given),
        patch("sys.stderr", open(os.devnull, "w")),
        patch("torch.distributed.init_process_group", lambda *args, **kwargs: wanted.append((args, kwargs))),
        patch("torch.distributed.destroy_process_group", lambda: None),
    ):
        try:
            with process_group("auto") as device:
                return device, told.device, wanted[0][0]
        except Exception as error:
            return str(error)


def test_a_process_takes_its_device(fake):
    assert fake(joined, 4, 3) == ("cuda", [3], ("cpu:gloo,cuda:nccl",))
    assert fake(joined, 1, 1) == "2 processes on a machine with 1 GPUs: start one a GPU"
    assert fake(joined, 1, 3, "3") == ("cuda", [0], ("cpu:gloo,cuda:nccl",))  # a launcher that shows each its own


def spread(mode, strategy, offload):
    """What FSDP is told of a model on the meta device, of which no part is computed."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    from minillama.parallel.sharding import make_mesh, shard

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(TINY))
    fsdp = FsdpConfig(strategy=strategy, cpu_offload=offload, precision="mixed")
    set_dtypes(model, fsdp)
    with answering():
        shard(model, make_mesh(fsdp, "cuda"), fsdp)
    group = model.model.layers[0]._get_fsdp_state()._fsdp_param_group
    policy = group.offload_policy
    pins = policy.pin_memory if isinstance(policy, CPUOffloadPolicy) else None
    return group.mesh_info.mesh.device_type, pins


@pytest.mark.parametrize(
    "strategy, offload, pins", [("full-shard", True, True), ("no-shard", True, False), ("full-shard", False, None)]
)
def test_sharding(fake, strategy, offload, pins):
    assert fake(spread, strategy, offload) == ("cuda", pins)


def test_weights_are_exchanged_when_the_device_has_copied_them():
    """Those of a reference, on the host as with --fsdp.cpu-offload: copies to the device may be under way."""
    model = random_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reference = FrozenWeights(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with answering(available=False) as told:
        with reference(model):
            assert told.synchronised == 1
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert told.synchronised == 2
    assert not model.lm_head.weight.any()


def checkpointed(mode, folder, layout, asynchronous):
    """A checkpoint of a run on the device whose parameters are on the host, as with --fsdp.cpu-offload."""
    from torch.utils._python_dispatch import _disable_current_modes

    from minillama.training.checkpoint import CheckpointConfig, Checkpoints
    from minillama.training.plan import Progress
    from minillama.training.resume import find_checkpoint

    settings = CheckpointConfig(format=layout, async_save=asynchronous)
    kept, generators = [], []
    with _disable_current_modes(), answering(available=False):
        for resumed in (False, True):
            torch.manual_seed(resumed)
            model = Llama(LlamaConfig.from_dict(TINY))
            optimizer = make_optimizer(model.parameters(), OptimConfig())
            found = find_checkpoint("auto", Path(folder))
            flags = {"model": "", "tokenizer": None, "train": {"batch_size": 1, "accumulate": 1}}
            about = {"flags": flags, "fingerprints": {"model": "", "data": ""}}
            with answering() as told:  # what stages the state asks for the device
                checkpoints = Checkpoints(
                    Path(folder),
                    settings,
                    model,
                    optimizer,
                    None,
                    "cuda",
                    packs_per_step=1,
                    about=about,
                    resume_from=found,
                )
            generators += told.generators
            stage, pinned = checkpoints.stager.stage, []

            def staged(state, stage=stage, pinned=pinned):
                with answering() as asked:
                    copy = stage(state)
                pinned.append(asked.pinned)
                return copy

            checkpoints.stager.stage = staged
            with checkpoints:
                if not resumed:
                    checkpoints.save(Progress(packs_per_step=1, step=3))
            kept.append((next(model.parameters()).detach().clone(), pinned))
    (saved, pinned), (loaded, _) = kept
    return torch.equal(saved, loaded), generators, pinned


@pytest.mark.parametrize("layout, asynchronous", [("sharded", True), ("full", True), ("sharded", False)])
def test_checkpoints(fake, tmp_path, layout, asynchronous):
    same, generators, pinned = fake(checkpointed, tmp_path, layout, asynchronous)
    assert same and generators == [list(range(16))]
    assert (len(pinned) == 1 and pinned[0] > 10) if asynchronous else not pinned


def profiled_run(mode, folder):
    """--profile.memory-snapshot and --profile.trace-dir around steps that compute nothing."""
    import warnings

    from torch.utils._python_dispatch import _disable_current_modes

    from minillama.errors import UserError
    from minillama.training.config import RunConfig
    from minillama.training.profiling import ProfileConfig, profiled

    folder, recorded, said = Path(folder), [], []
    profile = ProfileConfig(trace_dir=folder, memory_snapshot=folder / "snapshot.pickle")
    try:
        RunConfig(Path("none"), folder, profile=profile, device="cuda")
    except UserError as error:
        said.append(str(error))
    with answering():
        config = RunConfig(Path("none"), folder, profile=profile, device="cuda")
    metrics = SimpleNamespace(device="cuda", say=said.append, paused=SimpleNamespace)
    metrics.paused = lambda: patch.dict({})  # a context that does nothing
    answers = {
        "_cuda_record_memory_history": lambda *args: recorded.append(args),
        "_cuda_memorySnapshot": lambda *args: {"segments": []},
    }
    with _disable_current_modes(), warnings.catch_warnings(), patch.multiple("torch._C", create=True, **answers):
        warnings.simplefilter("ignore")  # that there is no CUDA
        with profiled(config.profile, metrics) as profiler:
            for _ in range(6):
                with profiler.step([]):
                    torch.ones(3) + 1
    with answering() as told:
        profiler._wait()
    held = pickle.loads((folder / "snapshot.pickle").read_bytes())
    return said, recorded, held, (folder / "rank0.pt.trace.json.gz").stat().st_size, told.synchronised


def test_profiles(fake, tmp_path):
    said, recorded, held, size, synchronised = fake(profiled_run, tmp_path)
    refused, table = said
    assert "--profile.memory-snapshot is of CUDA's memory" in refused
    assert "on cuda, most in" in table and size > 100
    assert len(recorded) == 2 and 100_000 in recorded[0] and recorded[1][0] is None
    assert held == {"segments": []} and synchronised == 1


def exhausted(mode, folder):
    """What is said when memory runs out on the device."""
    from minillama.errors import UserError
    from minillama.training.config import RunConfig
    from minillama.training.out_of_memory import out_of_memory_explained

    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(TINY))
    materialise(model, "cuda")
    optimizer = make_optimizer(model.parameters(), OptimConfig())
    config = RunConfig(Path("none"), Path(folder))
    closed = []
    try:
        with answering(available=False):
            metrics = SimpleNamespace(close=lambda: closed.append(True))
            with out_of_memory_explained(config, FsdpConfig(strategy="full-shard"), model, optimizer, metrics):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    except UserError as error:
        return str(error), closed


def test_running_out_of_memory(fake, tmp_path):
    message, closed = fake(exhausted, tmp_path)
    assert closed == [True]
    assert message.startswith("out of memory, asked for another 2560 MiB; rank 0 holds 3.00 GiB: ")
    for part in (
        "activations and all else 2.00",
        "reserved but not allocated 1.00",
        "--fsdp.recompute full",
        "expandable_segments",
    ):
        assert part in message


def checked(mode, group, part, folder):
    """What the checks of tools/gpu_check.py find, but for those that need FSDP's streams."""
    import contextlib
    import sys

    parts = str(Path(__file__).parents[1] / "tools" / "gpu_check_parts")
    if parts not in sys.path:
        sys.path.insert(0, parts)
    import model_parts as models
    from checks import Context, run
    from kernels import kernel_checks
    from runs import run_checks

    with (
        answering(available=False),
        patch.object(models, "shard", lambda model, *_: model),
        contextlib.ExitStack() as stack,
    ):
        context = Context("cuda", Path(folder), stack)
        context.joined = True
        checks = [*kernel_checks(context), *models.model_checks(context), *run_checks(context)]
        chosen = [check for check in checks if check.group == group and part in check.name]
        with patch("minillama.training.metrics.Metrics", lambda *_: SimpleNamespace(close=lambda: None)):
            return [run(check) for check in chosen]


@pytest.mark.parametrize(
    "group, part",
    [
        ("setup", "fp16"),
        ("loss", "bf16"),
        ("optimizer", "fp32 moments"),
        ("memory", ""),
        ("sync", "full-shard"),
        ("profile", "counted"),
        ("attention", "bf16, 8 query"),  # from here on only with --whole-matrix: slow
        ("recompute", ""),
        ("model", "mixed"),
        ("model", "fp32"),
        ("compile", ""),
        ("fp16", ""),
        ("generation", ""),
    ],
)
def test_the_checks_for_a_device_come_to_their_end(fake, tmp_path, group, part, request):
    """With numbers that mean nothing."""
    slow = ("attention", "recompute", "model", "compile", "fp16", "generation")
    if group in slow and not request.config.getoption("--whole-matrix"):
        pytest.skip("executes many small operations")
    rows = fake(checked, group, part, tmp_path)
    assert rows
    for row in rows:  # an AssertionError is a check's own, of such a number
        assert row["error"] is not None or row["detail"].startswith("AssertionError"), row
