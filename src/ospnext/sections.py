"""The configuration sections that commands share: what to load, in which numbers, on how many processes."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ospnext.config import Config

DType = Literal["bf16", "bfloat16", "fp16", "float16", "fp32", "float32", "float"]
AttentionKernel = Literal["auto", "sdpa", "cudnn", "flash2", "flash3", "flash4"]
ScaleMax = Annotated[float, Field(ge=2.0**-8, le=384)]
SHIFTS = (0.01, 1000.0)  # beyond them float32 has no noise levels between 0 and 1
Shift = Annotated[float, Field(ge=SHIFTS[0], le=SHIFTS[1])]
Width = Annotated[int, Field(ge=1, le=2**20)]  # with patches of at most 64: beyond, torch cannot count a weight's bytes
Patch = Annotated[int, Field(ge=1, le=64)]
Fps = Annotated[float, Field(ge=0.1, le=1000)]
Format = Literal["hif8", "none"]


class QuantKeys(Config):
    """HiF8 of a transformer; None means what its checkpoint says, else off (or the default)."""

    quant: Format | None = Field(default=None, description="hif8: the blocks' linears in HiF8; none: in plain numbers")
    quant_attn: Format | None = Field(default=None, description="hif8: queries, keys and values in HiF8, too")
    scale_max_forward: ScaleMax | None = Field(
        default=None, description="what the largest activation and weight is scaled to; default: 15"
    )
    scale_max_backward: ScaleMax | None = Field(
        default=None, description="what the largest gradient is scaled to; default: 224"
    )
    quant_keep: tuple[str, ...] | None = Field(
        default=None, description="name patterns of layers that stay in plain numbers, such as blocks.0.*"
    )
    quant_scaling: Literal["tensor", "token", "running"] | None = Field(
        default=None, description="tensor | token | running: whose largest number scales; default: tensor"
    )
    quant_execution: Literal["auto", "emulation", "fp8", "ascend"] | None = Field(
        default=None, description="what multiplies; default: auto, the tensor cores where there are any that can"
    )


class ModelConfig(QuantKeys):
    """The transformer: its weights, its architecture where these bring no config.json of their own, and HiF8.

    None means: what the checkpoint folder says, else the default of ``OSPNextTransformer3DModel``.
    """

    pretrained_model_dir_or_checkpoint: str | None = Field(
        default=None, description="weights: a folder or a single file"
    )
    patch_size: tuple[Patch, Patch, Patch] | None = Field(
        default=None, description="latent patch (t, h, w) of one token"
    )
    text_len: Width | None = Field(default=None, description="text tokens the transformer reads")
    in_dim: Width | None = Field(default=None, description="latent channels in")
    out_dim: Width | None = Field(default=None, description="latent channels out")
    dim: Width | None = Field(default=None, description="width of the hidden states")
    ffn_dim: Width | None = Field(default=None, description="width inside the feed-forward layers")
    freq_dim: Width | None = Field(
        default=None, multiple_of=2, description="width of the sinusoidal time embedding, even"
    )
    text_dim: Width | None = Field(default=None, description="width of the text embeddings")
    num_heads: Width | None = Field(default=None, description="attention heads")
    num_layers: int | None = Field(default=None, ge=1, le=1000, description="transformer blocks")
    qk_norm: bool | None = Field(default=None, description="normalise queries and keys")
    cross_attn_norm: bool | None = Field(default=None, description="normalise before cross-attention")
    eps: float | None = Field(default=None, gt=0, le=1, description="epsilon of the norms")
    skiparse_model_type: Literal["full", "dual_end", "uniform"] | None = Field(
        default=None, description="which blocks are sparse: full none, dual_end all but both ends, uniform all"
    )
    sparse_ratio: int | None = Field(default=None, ge=1, le=1000, description="P: a sparse block has P*P segments")
    num_full_blocks: int | None = Field(default=None, ge=0, description="dense blocks among num_layers")
    skiparse_pattern: Literal["2d", "1d"] | None = Field(
        default=None, description="the sparse pattern: 2d, or 1d to compare"
    )

    def architecture(self) -> dict[str, Any]:
        """The architecture keys that were given, for the transformer's constructor or to compare with its config."""
        others = {"pretrained_model_dir_or_checkpoint", *QuantKeys.model_fields}
        return self.model_dump(exclude=others, exclude_none=True)


class VAEConfig(Config):
    """The video autoencoder."""

    vae_path: str | None = Field(default=None, description="weights: Wan2.1_VAE.pth or a diffusers folder")
    dtype: DType = Field(default="fp32", description="numbers of the autoencoder")


class TextEncoderConfig(Config):
    """The text encoder and its tokenizer."""

    text_len: Width | None = Field(default=None, description="text tokens; default: the transformer's (512 for Wan)")
    checkpoint_path: str | None = Field(
        default=None, description="weights: models_t5_umt5-xxl-enc-bf16.pth or a folder"
    )
    text_tokenizer_path: str | None = Field(default=None, description="tokenizer folder, such as google/umt5-xxl/")
    dtype: DType | None = Field(default=None, description="numbers of the text encoder; default: weight_dtype")


class LoraConfig(Config):
    """The adapter that is trained in place of the model's weights."""

    rank: int = Field(
        default=32, ge=1, le=2**14, description="rows of A and columns of B: how much an adapter can learn"
    )
    alpha: float = Field(default=64, gt=0, le=10**6, description="an adapter adds alpha / rank times B A to a weight")
    target_modules: tuple[str, ...] = Field(
        default=tuple(f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in "qkvo"),
        min_length=1,
        description="linears that have one, by the ends of their names; also ffn.0, ffn.2",
    )
    lora_path: str | None = Field(
        default=None, description="start from this adapter, a folder or a file, with its own rank and linears"
    )


class SchedulerConfig(Config):
    """What all flow-matching schedules share."""

    scheduler_name: Literal["flow_matching"] = Field(default="flow_matching", description="the one schedule there is")


class ParallelConfig(Config):
    """How many processes share the work; in one process every size is 1."""

    fsdp_size: int = Field(default=8, ge=1, description="ranks that share one copy of the weights; at most all")
    ddp_size: int | None = Field(
        default=None, ge=1, description="copies of the weights; default: the rest of the ranks"
    )
    sp_size: int = Field(default=1, ge=1, description="Ulysses ranks per sequence, with use_sequence_parallel")
    skiparse_sp_size: int = Field(
        default=1, ge=1, description="sparse ranks per sequence, with use_skiparse_sequence_parallel"
    )
    use_sequence_parallel: bool = Field(default=False, description="split sequences over sp_size ranks")
    use_skiparse_sequence_parallel: bool = Field(
        default=False, description="split sequences over skiparse_sp_size ranks"
    )
    cfg_parallel_size: int = Field(
        default=1, ge=1, le=2, description="2: the halves of guidance on ranks of their own; only in sampling"
    )
    reshard_after_forward: bool | None = Field(
        default=None, description="free gathered weights after each block; default: true. With fsdp_size above 1"
    )
    explicit_prefetching_num_blocks: int = Field(
        default=0, ge=0, description="blocks whose weights are gathered ahead; 0: FSDP2's own order"
    )
    model_cpu_offload: bool = Field(
        default=False, description="keep the transformer in host memory while it is not needed"
    )

    @property
    def sequence(self) -> tuple[int, int]:
        """Sub-groups and ranks of each that share a video's tokens: ``(ssp, ulysses)``."""
        ulysses = self.sp_size if self.use_sequence_parallel else 1
        return self.skiparse_sp_size if self.use_skiparse_sequence_parallel else 1, ulysses

    def shards(self, world_size: int) -> int:
        """Ranks that share one copy of the weights: ``fsdp_size``, at most all; where nobody chose, one that fits."""
        if "fsdp_size" in self.model_fields_set:
            return min(self.fsdp_size, world_size)
        return next(n for n in range(min(self.fsdp_size, world_size), 0, -1) if world_size % n == 0)


class RunConfig(ParallelConfig):
    """Base of every command that loads the model."""

    model_name: Literal["osp_next", "wan_t2v"] = Field(
        default="osp_next", description="wan_t2v: the same model, all dense"
    )
    transformer_config: ModelConfig = Field(default=ModelConfig(), alias="model_config")
    vae_config: VAEConfig = VAEConfig()
    text_encoder_config: TextEncoderConfig = TextEncoderConfig()
    seed: int = Field(default=42, ge=0, lt=2**63, description="seed of all random numbers")
    output_dir: str = Field(default="./output", min_length=1, description="where results go")
    weight_dtype: DType = Field(default="bf16", description="numbers of the transformer")
    device: str = Field(default="auto", description="auto | cpu | cuda | npu | mps, or one of several as cuda:1")
    attention_kernel: AttentionKernel = Field(default="auto", description="auto picks the fastest that runs here")

    def architecture(self) -> dict[str, Any]:
        """The architecture keys this configuration asks for; the rest is the checkpoint's or the model's default."""
        given = self.transformer_config.architecture()
        if self.text_encoder_config.text_len is not None:
            given["text_len"] = self.text_encoder_config.text_len
        return given | {"skiparse_model_type": "full"} if self.model_name == "wan_t2v" else given

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        kind = self.transformer_config.skiparse_model_type
        if self.model_name == "wan_t2v" and kind not in (None, "full"):
            raise ValueError(f"model_name wan_t2v is dense, but model_config.skiparse_model_type is {kind!r}: keep one")
        read, encoded = self.transformer_config.text_len, self.text_encoder_config.text_len
        if None not in (read, encoded) and read != encoded:
            raise ValueError(f"model_config.text_len is {read}, but text_encoder_config.text_len is {encoded}")
        return self

    def alone(self) -> Self:
        """This configuration for one process; what that shrinks is said in ``notices``."""
        sizes = ("fsdp_size", "ddp_size", "sp_size", "skiparse_sp_size", "cfg_parallel_size")
        shrunk = [f"{name} {getattr(self, name)}" for name in sizes if name in self.model_fields_set]
        shrunk = [text for text in shrunk if text.split()[1] not in ("1", "None")]
        lines = [f"one process: {', '.join(shrunk)} {'become' if len(shrunk) > 1 else 'becomes'} 1"] if shrunk else []
        whole = {"reshard_after_forward": None, "explicit_prefetching_num_blocks": 0}
        lines += [
            f"{name} has no effect here: the model is whole in one process, nothing is sharded"
            for name, without in whole.items()
            if getattr(self, name) != without
        ]
        off = {"use_sequence_parallel": False, "use_skiparse_sequence_parallel": False}
        return self.model_copy(update=dict.fromkeys(sizes, 1) | off | whole).with_notices(lines)
