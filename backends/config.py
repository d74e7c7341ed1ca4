"""The `optimizer:` and `backend:` sections of a run: how weights are updated, and where a step runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from crystal.config import Strict, Tally, parse, within
from crystal.errors import WrongValue
from crystal.mup.plan import Plan
from crystal.zoo.build import plan_for
from crystal.zoo.config import Eps, ModelConfig, preset

Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0), within(1, 1 << 20)]  # of processes, threads, systems
Gigabytes = Annotated[float, Field(gt=0), within(1e-6, 10**6)]  # a kilobyte to a petabyte
Compute = Literal["auto", "bf16", "fp32"]


class OptimizerConfig(Strict):
    """AdamW (Loshchilov & Hutter 2019); per-group numbers come from the parameter plan.

    adamw is torch's formula. adamw_cerebras adds eps before the bias correction, as the software that CrystalCoder
    was trained with does (backends/adamw.py).
    """

    name: Literal["adamw", "adamw_cerebras"] = Field("adamw", description="torch's formula, or Cerebras'")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="decay of the first and of the second moment")
    eps: Eps = Field(1e-8, description="added to the root of the second moment")
    weight_decay: Annotated[float, within(0, 1000)] = Field(0.1, ge=0, description="decoupled, times the learning rate")
    decay_norms_and_biases: bool = Field(False, description="whether norms and biases are decayed too")
    grad_clip: Annotated[float, Field(gt=0), within(1e-12, 10**12)] | None = Field(
        1.0, description="bound on the global gradient norm; null: none"
    )

    def plan_for(self, model: ModelConfig) -> Plan:
        """The parameter plan of a model that is trained with this: the one way from a run to its plan."""
        return _plan(model, weight_decay=self.weight_decay, decay_vectors=self.decay_norms_and_biases, eps=self.eps)


_plan = cache(plan_for)  # a plan is made of three decoders on the meta device, and asked for more than once


@cache
def load_preset(name: str) -> tuple[ModelConfig, OptimizerConfig]:
    """A preset or a rung of a ladder, and the optimizer it is published with. Raises ConfigError."""
    source = preset(name)
    return (
        parse(ModelConfig, source.mapping["model"], source, ("model",)),
        parse(OptimizerConfig, source.mapping.get("optimizer", {}), source, ("optimizer",)),
    )


class CpuConfig(Strict):
    """The reference backend."""

    name: Literal["cpu"] = Field("cpu", description="where steps run: cpu, cuda, weight_streaming or cerebras")
    dtype: Compute = Field("auto", description="compute; auto: the faster here. Weights and moments are always fp32")
    compile: bool = Field(False, description="torch.compile of each block: a minute or so at the start")
    threads: Count | None = Field(None, description="null: torch's default")


class Layout(Strict):
    """How many processes along each dimension of the device mesh; their product is the number of processes."""

    dp: Count = Field(1, description="replicas, whole or of sharded weights")
    fsdp: Count = Field(1, description="shards of weights, gradients and moments (FSDP2)")
    tp: Count = Field(1, description="shards of each matrix product")
    pp: Count = Field(1, description="pipeline: processes that the blocks are spread over")
    interleave: Count = Field(2, description="stages of each pipeline process; with more, less time is spent waiting")
    sequence: bool = Field(True, description="with tp, norms and residual stream divided by tokens: less memory")

    @property
    def processes(self) -> int:
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def token_shards(self) -> int:
        """Processes over which norms and the residual stream are divided."""
        return self.tp if self.sequence else 1


class CudaConfig(Strict):
    """GPUs under torchrun, one process each; device cpu runs the same layouts over gloo."""

    name: Literal["cuda"] = Field(description="where steps run: cpu, cuda, weight_streaming or cerebras")
    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu: the same layouts over gloo")
    dtype: Compute = Field("auto", description="compute; auto: the faster here. Weights and moments are always fp32")
    parallel: Layout = Layout()
    compile: bool = Field(True, description="torch.compile of each block")
    recompute: Literal["none", "attention", "block"] = Field("none", description="activation checkpointing")


class WeightStreamingConfig(Strict):
    """Weights and moments live in a store, on disk or in memory, and pass through the device layer by layer."""

    name: Literal["weight_streaming"] = Field(description="where steps run: cpu, cuda, weight_streaming or cerebras")
    device: Literal["cpu", "cuda"] = Field("cpu", description="what the blocks are computed on")
    dtype: Compute = Field("auto", description="compute; auto: the faster here. The store's weights are exact fp32")
    moments: Literal["fp32", "bf16", "int8"] = Field("fp32", description="AdamW's moments in the store")
    gradients: Literal["spilled", "recomputed"] = Field(
        "spilled", description="until the update: written to the store, or made again from what a block took and gave"
    )
    store: Literal["disk", "memory"] = Field("disk", description="where weights and moments are kept")
    path: Path | None = Field(None, description="directory of the store, the run's own; null: in the run directory")
    buffers_gb: Gigabytes | None = Field(
        None, description="memory to read ahead and write behind in; null: a block's whole state"
    )
    activations_gb: Gigabytes = Field(1.0, description="micro-batches whose kept activations fit share one pass")
    full_checkpoints: bool = Field(False, description="write whole checkpoints; false: they refer to the store")
    threads: Count | None = Field(None, description="null: torch's default")

    @model_validator(mode="after")
    def _device(self) -> WeightStreamingConfig:
        if self.device != "cpu":
            raise WrongValue(f"weight_streaming computes on the cpu, expected cpu, got {self.device}", "device")
        return self


class ClusterConfig(Strict):
    """A Cerebras system; keys are those of cerebras.pytorch's own ClusterConfig."""

    mgmt_address: str = Field(description="address of the cluster's management node")
    mgmt_namespace: str | None = Field(None, description="namespace of the job on the cluster; null: the cluster's")
    credentials_path: Path | None = Field(None, description="the cluster's TLS certificate; null: the system's")
    num_csx: Count = Field(1, description="systems; the global batch is divided among them")
    mount_dirs: tuple[Path, ...] = Field((), description="shared directories, besides the spool and this package")
    job_labels: tuple[str, ...] = Field((), description="labels of the job, KEY=VALUE")
    micro_batch_size: Literal["auto", "explore"] | Count = Field("auto", description="rows that a system takes at once")
    session_steps: Tally = Field(100, description="steps between points where weights can be read back")
    spool: Path | None = Field(None, description="directory that the cluster sees too; null: in the run directory")


class CerebrasConfig(Strict):
    """cerebras.pytorch in its own environment; device cpu is its CPU backend, csx its systems."""

    name: Literal["cerebras"] = Field(description="where steps run: cpu, cuda, weight_streaming or cerebras")
    device: Literal["cpu", "csx"] = Field("cpu", description="Cerebras' CPU backend, or its systems")
    dtype: Literal["bf16", "fp32", "cbfloat16"] | None = Field(
        None, description="compute; weights and moments are always fp32. null: fp32 on cpu, bf16 on csx"
    )
    threads: Count | None = Field(None, description="cpu; null: torch's default")
    environment: Path | None = Field(None, description="made by `crystal cerebras setup`; null: in the cache")
    cluster: ClusterConfig | None = Field(None, description="csx; null: no system")

    @model_validator(mode="after")
    def _dtype_of_the_device(self) -> CerebrasConfig:
        if self.dtype is not None and (self.dtype == "fp32") != (self.device == "cpu"):
            expected = "fp32, in which Cerebras' CPU backend computes" if self.device == "cpu" else "bf16 or cbfloat16"
            raise WrongValue(f"expected {expected}, got {self.dtype}", "dtype")
        return self

    @property
    def compute_dtype(self) -> str:
        """The dtype that is in force."""
        return self.dtype or ("fp32" if self.device == "cpu" else "bf16")


def _name(section: Any) -> str:
    """Which backend a section is for: cpu where it does not say, and where it is no section at all."""
    return section.get("name", "cpu") if isinstance(section, dict) else getattr(section, "name", "cpu")


BackendConfig = Annotated[
    Annotated[CpuConfig, Tag("cpu")]
    | Annotated[CudaConfig, Tag("cuda")]
    | Annotated[WeightStreamingConfig, Tag("weight_streaming")]
    | Annotated[CerebrasConfig, Tag("cerebras")],
    Discriminator(_name),
]
