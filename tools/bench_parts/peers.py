"""transformers with peft, and torchtune, as contenders of tools/bench.py. Each library is imported by its own class."""

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn
from work import ALPHA, CLIP_NORM, LR, PROMPT_LEN, RANK, Job, Work, compute_dtype, fill

from minillama.errors import UserError

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TorchPeer:
    """Common to both peers: AdamW, clipping and the order of a step as their users write it."""

    model: nn.Module
    device: str

    def prepare(self) -> None:
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LR, weight_decay=0.0, fused=True)
        self.model.train()

    def finish(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trainable, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm


class HuggingFace(TorchPeer):
    """transformers, with peft's LoRA or AdaptionPrompt.

    Documents: given positions that restart and no attention mask, transformers makes the block-diagonal causal mask
    itself (masking_utils.find_packed_sequence_indices). Full fine-tuning in mixed precision: fp32 weights and autocast,
    as its Trainer's bf16=True does it.
    """

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self.device, self.packed = job["device"], job["documents"] == "packed"
        full, bf16 = job["method"] == "full", job["precision"] == "bf16"
        self.autocast = full and job["precision"] == "mixed"
        with torch.device(self.device):
            self.model = hugging_face_model(job["config"], torch.float32 if self.autocast else compute_dtype(job))
        if not full:
            from peft import AdaptionPromptConfig, LoraConfig, get_peft_model

            adapter: Any = LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules=job["targets"] if job["targets"] != ["all-linear"] else "all-linear",
                task_type="CAUSAL_LM",
            )
            if job["method"] == "llama-adapter":
                layers = min(30, job["config"]["num_hidden_layers"])
                adapter = AdaptionPromptConfig(adapter_len=PROMPT_LEN, adapter_layers=layers, task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, adapter, autocast_adapter_dtype=not bf16)  # type: ignore[arg-type]
        if job["recompute"] != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        named = ((hugging_face_name(name), parameter) for name, parameter in self.model.named_parameters())
        fill(named, job["config"]["hidden_size"])
        self.prepare()
        if job["compile"]:
            self.model.compile()

    def step(self, work: Work) -> tuple[Tensor, Tensor]:
        labels = work.tokens.masked_fill(work.positions == 0, -100)  # it shifts them itself
        inputs = {"input_ids": work.tokens.to(self.device), "labels": labels.to(self.device)}
        if self.packed:
            inputs["position_ids"] = work.positions.to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.model(**inputs).loss
        return self.finish(loss)


def hugging_face_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    fields = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]} | (config["rope_scaling"] or {})
    whole = transformers.LlamaConfig(**fields, rope_parameters=rope, attn_implementation="sdpa", use_cache=False)
    torch.set_default_dtype(dtype)
    model = transformers.LlamaForCausalLM(whole)
    torch.set_default_dtype(torch.float32)
    return model


def hugging_face_name(name: str) -> str:
    """Ours, of a parameter that peft has wrapped."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    return name.replace(".self_attn.model.", ".self_attn.")


class Torchtune(TorchPeer):
    """torchtune 0.6.1: its model, LoRA, chunked loss, masks of packed documents, recompute and compile.

    It trains in one dtype: in mixed precision bf16. Rows of q and k are in Meta's order.
    """

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        from torchtune import modules, training
        from torchtune.models.llama3_1 import _component_builders as untied
        from torchtune.models.llama3_2 import _component_builders as tied
        from torchtune.modules.loss import CEWithChunkedOutputLoss
        from torchtune.modules.peft import get_adapter_params, set_trainable_params

        self.device, self.packed, config = job["device"], job["documents"] == "packed", job["config"]
        if job["method"] == "llama-adapter":
            raise UserError("torchtune has no llama-adapter")
        shape = {
            "vocab_size": config["vocab_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "embed_dim": config["hidden_size"],
            "intermediate_dim": config["intermediate_size"],
            "max_seq_len": max(8192, job["context_length"]),
            "norm_eps": config["rms_norm_eps"],
            "rope_base": config["rope_theta"],
            "scale_factor": (config["rope_scaling"] or {}).get("factor", 1),
        }
        builders: Any = tied if config["tie_word_embeddings"] else untied
        suffix = "2" if config["tie_word_embeddings"] else "1"
        torch.set_default_dtype(compute_dtype(job))
        with torch.device(self.device):
            if job["method"] == "full":
                model = getattr(builders, f"llama3_{suffix}")(**shape)
            else:
                targets = LINEAR if job["targets"] == ["all-linear"] else job["targets"]
                mlp = [target for target in targets if target in LINEAR[4:]]
                if len(mlp) not in (0, 3):
                    raise UserError("torchtune's LoRA adapts all three layers of an MLP or none")
                model = getattr(builders, f"lora_llama3_{suffix}")(
                    lora_attn_modules=[t.replace("o_proj", "output_proj") for t in targets if t not in mlp],
                    apply_lora_to_mlp=bool(mlp),
                    lora_rank=RANK,
                    lora_alpha=ALPHA,
                    lora_dropout=0.0,
                    **shape,
                )
                set_trainable_params(model, get_adapter_params(model))
        torch.set_default_dtype(torch.float32)
        self.model, self.loss = model, CEWithChunkedOutputLoss()
        fill(((torchtune_name(name), parameter) for name, parameter in model.named_parameters()), shape["embed_dim"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if re.search(r"[qk]_proj\.(lora_b\.)?weight$", name):
                    halves = parameter.view(-1, 2, config["head_dim"] // 2, parameter.shape[1])
                    parameter.copy_(halves.transpose(1, 2).reshape(parameter.shape))
        self.prepare()
        if job["recompute"] != "none":
            training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        if job["compile"]:
            training.compile_model(model, verbose=False)
            training.compile_loss(self.loss, verbose=False)
        model.set_num_output_chunks(self.loss.num_output_chunks)

    def step(self, work: Work) -> tuple[Tensor, Tensor]:
        from torchtune.modules.attention_utils import packed_block_causal_mask

        more: dict[str, Any] = {}
        if self.packed:
            more["mask"] = packed_block_causal_mask([torch.tensor(row) for row in work.lengths])
            if isinstance(more["mask"], Tensor):
                more["mask"] = more["mask"].to(self.device)
            more["input_pos"] = work.positions.to(self.device)
        logits = self.model(work.tokens.to(self.device), **more)
        return self.finish(self.loss(logits, work.labels.to(self.device)))


def torchtune_name(name: str) -> str:
    """Ours."""
    for theirs, ours in {
        ".attn.output_proj.": ".self_attn.o_proj.",
        ".attn.": ".self_attn.",
        ".mlp.w1.": ".mlp.gate_proj.",
        ".mlp.w2.": ".mlp.down_proj.",
        ".mlp.w3.": ".mlp.up_proj.",
        ".sa_norm.scale": ".input_layernorm.weight",
        ".mlp_norm.scale": ".post_attention_layernorm.weight",
        "norm.scale": "norm.weight",
        "tok_embeddings.": "embed_tokens.",
        ".lora_a.": ".lora_A.",
        ".lora_b.": ".lora_B.",
    }.items():
        name = name.replace(theirs, ours)
    return name.replace("output.", "lm_head.") if name.startswith("output.") else f"model.{name}"


class HuggingFaceGenerating:
    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        import transformers

        self.job = job
        if job["model"]:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=compute_dtype(job))
            self.model: Any = loaded.to(job["device"])
        else:
            with torch.device(job["device"]):
                self.model = hugging_face_model(job["config"], compute_dtype(job))
            fill(self.model.named_parameters(), job["config"]["hidden_size"])

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        tokens = torch.tensor([prompt], device=self.job["device"])
        self.model.generation_config.eos_token_id = None  # ours is not told of any either
        settings: Any = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        result = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        return result[0, len(prompt) :].tolist()
