"""Small models of transformers and peft with random weights, on HSDP and DDP; see phases.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from phases import Kind, hybrid, moment, run_job, shard, updating
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

VOCABULARY, LENGTH = 128, 8

dist.init_process_group("gloo")
mesh = hybrid()


def sizes() -> dict[str, Any]:
    """The same for all models."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "attention_dropout": 0.1,
        "use_cache": False,
    }


def probe(layer: nn.Module) -> None:
    """Let the moments "forward" and "backward" be behind this layer."""

    def seen(_module: nn.Module, _args: Any, output: Any) -> None:
        moment("forward")
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda grad: moment("backward"))

    layer.register_forward_hook(seen)


def words(step: int) -> Tensor:
    """The same for a step and rank in every run."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(VOCABULARY, (2, LENGTH), generator=generator)


def trained(model: nn.Module, key: str = "model", **options: Any) -> Kind:
    """The model with AdamW, gradients clipped, and a warm-up."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    updating(optimizer)

    def step(number: int) -> Tensor:
        text = words(number)
        loss: Tensor = model(input_ids=text, labels=text).loss
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        moment("computed")
        optimizer.step()
        moment("stepped")
        scheduler.step()
        optimizer.zero_grad()
        return loss.detach()

    return Kind({key: model, "optimizer": optimizer, "scheduler": scheduler}, step)


def llama_model() -> nn.Module:
    """Two layers of Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**sizes(), tie_word_embeddings=True))
    probe(model.model.layers[0])
    return model


def llama() -> Kind:
    """Llama with tied embeddings on HSDP."""
    model = llama_model()
    return trained(shard(model, mesh, type(model.model.layers[0])))


def mixtral() -> Kind:
    """A mixture of experts on HSDP, with the router's loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **sizes(), num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, sliding_window=None
    )
    model = MixtralForCausalLM(config)
    probe(model.model.layers[0])
    return trained(shard(model, mesh, type(model.model.layers[0])), foreach=True)


def lora_model() -> Any:
    """Llama with frozen weights and low-rank adapters."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        llama_model(), LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    )


def lora_ddp() -> Kind:
    """Adapters on DDP."""
    return trained(DistributedDataParallel(lora_model()))


def lora_hsdp() -> Kind:
    """Adapters on HSDP: each unit has frozen and trained parameters."""
    model = lora_model()
    return trained(shard(model, mesh, type(model.base_model.model.model.layers[0])))


run_job(
    {
        "llama": llama,
        "mixtral": mixtral,
        "lora_ddp": lora_ddp,
        "lora_hsdp": lora_hsdp,
    }
)
