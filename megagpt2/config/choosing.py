"""The rules about implementations of operators (`kernels` in the configuration); `rules.py` has the table."""

from megagpt2.config.facts import Facts
from megagpt2.config.refusals import Refusal
from megagpt2.config.schema import Config


def attention_draws_dropout(config: Config, facts: Facts) -> Refusal | None:
    """sdpa draws dropout from a generator, not from (sample, coordinate)."""
    dropout = config.model.attention_dropout
    if config.kernels.attention != "sdpa" or not dropout:
        return None
    why = (
        f"torch's fused attention can't draw the masks of model.attention_dropout ({dropout}), which are the same on"
        " every layout"
    )
    candidates = [{"kernels.attention": "fused_softmax"}, {"model.attention_dropout": 0.0}]
    return Refusal("kernels.attention", "sdpa", why, candidates)


def apex_present(config: Config, facts: Facts) -> Refusal | None:
    """apex is optional."""
    for field in ("layer_norm", "adam"):
        if getattr(config.kernels, field) == "apex" and facts.apex is not None:
            candidates = [{f"kernels.{field}": name} for name in ("fused", "torch")]
            return Refusal(f"kernels.{field}", "apex", facts.apex, candidates)
    return None


def apex_adam_on_gpu(config: Config, facts: Facts) -> Refusal | None:
    """Offloaded masters are updated by the processor; apex's FusedAdam takes tensors of a GPU only."""
    offload, kernels = config.offload, config.kernels
    if kernels.adam != "apex" or config.optimizer.name != "adamw" or offload.optimizer == "none":
        return None
    why = f"offload.optimizer is {offload.optimizer}: the processor makes the update, and apex's Adam runs on GPUs only"
    candidates = [*({"kernels.adam": name} for name in ("fused", "torch")), {"offload.optimizer": "none"}]
    return Refusal("kernels.adam", "apex", why, candidates)


def operators_present(config: Config, facts: Facts) -> Refusal | None:
    """On a GPU, training in plain torch by accident wastes what the machine costs."""
    if facts.device != "cuda" or facts.operators is None or config.kernels.allow_reference:
        return None
    return Refusal(
        "kernels.allow_reference", "false", f"the compiled operators can't be used on this GPU: {facts.operators}",
        [{"kernels.allow_reference": True}],
    )
