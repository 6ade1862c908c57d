"""The subcommands of ``ospnext``: a table of names, no code. Modules are imported when a command is called."""

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand.

    Attributes:
        summary: its line in ``ospnext --help``.
        config: ``module:Class`` of its configuration.
        run: ``module:function`` that takes the configuration and returns a line to print, or None.
        options: ``--option`` and the key it sets.
        arguments: the keys its plain words set, in order; () where the one plain word is a YAML file.
        examples: command lines, without the program's name.
        reports: whether its run says itself, in a report, what the configuration has to say (``notices``).
        rest: the key that takes ``key=value`` words which are not its own; "" where there is none.
        many: whether it runs on many processes: its run takes the ``Launch`` too.
    """

    summary: str
    config: str
    run: str
    options: Mapping[str, str] = {}
    arguments: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    reports: bool = False
    rest: str = ""
    many: bool = False


COMMANDS: dict[str, Command] = {
    "generate": Command(
        "make videos from prompts",
        "ospnext.generate.settings:GenerateConfig",
        "ospnext.generate.run:run",
        options={"--prompt": "prompt", "--prompts": "prompts"},
        examples=(
            "generate --prompt 'A large red star floats upwards on a white background.'",
            "generate model=checkpoints/Wan2.1-T2V-1.3B --prompts prompts.txt num_videos_per_prompt=2 output_dir=out",
            "generate configs/generate/osp_14b.yaml scheduler_config.num_inference_steps=30 seed=7",
        ),
        reports=True,
        many=True,
    ),
    "train": Command(
        "train the transformer on videos",
        "ospnext.train.settings:TrainConfig",
        "ospnext.train.sft:run",
        examples=(
            "train configs/shapes/transformer.yaml time_budget_minutes=10",
            "train configs/train/osp_1_3b.yaml data_config.dataset_config.metafile_or_dir_path=data/clips",
        ),
        many=True,
    ),
    "rl": Command(
        "train an adapter by reinforcement learning",
        "ospnext.train.rl.settings:RLConfig",
        "ospnext.train.rl.run:run",
        examples=(
            "rl configs/rl/shapes.yaml time_budget_minutes=9",
            "rl configs/rl/osp_14b.yaml rl_config.prompt_file=prompts.txt",
        ),
        reports=True,
        many=True,
    ),
    "export": Command(
        "make a pipeline folder of a training state",
        "ospnext.train.export:ExportConfig",
        "ospnext.train.export:run",
        arguments=("state", "dst"),
        examples=("export runs/shapes_transformer/iter_000012000 out/pipeline",),
    ),
    "train-vae": Command(
        "train a small video VAE on moving shapes",
        "ospnext.train.video_vae:VAETrainConfig",
        "ospnext.train.video_vae:run",
        examples=("train-vae configs/shapes/vae.yaml time_budget_minutes=10",),
    ),
    "train-text": Command(
        "train a small text encoder on captions of moving shapes",
        "ospnext.train.text:TextTrainConfig",
        "ospnext.train.text:run",
        examples=("train-text configs/shapes/text.yaml",),
    ),
    "evaluate-shapes": Command(
        "grade a model on held-out prompts of the shapes world",
        "ospnext.evaluate.shapes:EvaluateShapesConfig",
        "ospnext.evaluate.shapes:run",
        examples=("evaluate-shapes num_prompts=64", "evaluate-shapes model=runs/shapes_transformer/pipeline"),
    ),
    "compare-shapes": Command(
        "compare two models or settings on the same prompts and seeds of the shapes world",
        "ospnext.evaluate.compare:CompareShapesConfig",
        "ospnext.evaluate.compare:run",
        examples=(
            "compare-shapes other.quant=hif8 other.quant_attn=hif8",
            "compare-shapes model=runs/shapes_dense/pipeline other.model=runs/shapes_dense_to_sparse/pipeline",
        ),
    ),
    "evaluate reward": Command(
        "score a folder of videos by the rewards of reinforcement learning",
        "ospnext.evaluate.reward:EvaluateRewardConfig",
        "ospnext.evaluate.reward:run",
        arguments=("folder",),
        examples=(
            "evaluate reward outputs/osp_14b 'reward_fn={flicker: 1.0, motion: 1.0}'",
            "evaluate reward outputs/osp_14b 'reward_fn={videoalign: 1.0}' 'reward_config.options={videoalign: "
            "{load_from_pretrained: checkpoints/VideoReward, base_model: checkpoints/Qwen2-VL-2B-Instruct}}'",
        ),
    ),
    "convert": Command(
        "write a transformer checkpoint in another format",
        "ospnext.prepare.convert:ConvertConfig",
        "ospnext.prepare.convert:run",
        options={"--to": "to"},
        arguments=("src", "dst"),
        examples=("convert checkpoints/osp_next_14b out/diffusers --to diffusers",),
    ),
    "quantize": Command(
        "write a checkpoint whose weights take 8 bits (HiF8)",
        "ospnext.prepare.quantize:QuantizeConfig",
        "ospnext.prepare.quantize:run",
        arguments=("src", "dst"),
        examples=("quantize checkpoints/osp_next_14b checkpoints/osp_next_14b_hif8", "quantize shapes out/shapes_hif8"),
    ),
    "merge-lora": Command(
        "merge a LoRA into a model's weights",
        "ospnext.prepare.merge_lora:MergeLoraConfig",
        "ospnext.prepare.merge_lora:run",
        arguments=("base", "adapter", "dst"),
        examples=(
            "merge-lora checkpoints/osp_next_14b runs/lora/adapter out/merged",
            "merge-lora shapes style.safetensors out/merged scale=0.8",
        ),
    ),
    "convert-lora": Command(
        "write a LoRA under other programs' names",
        "ospnext.prepare.merge_lora:ConvertLoraConfig",
        "ospnext.prepare.merge_lora:convert",
        options={"--to": "to"},
        arguments=("src", "dst"),
        examples=("convert-lora runs/lora/adapter out/style.safetensors --to comfyui",),
    ),
    "plan": Command(
        "say what a run needs: memory, traffic, time",
        "ospnext.prepare.plan:PlanConfig",
        "ospnext.prepare.plan:run",
        options={"--world": "world", "--json": "json"},
        arguments=("config",),
        examples=(
            "plan configs/generate/osp_14b.yaml --world 8",
            "plan configs/generate/osp_14b.yaml --world 64 accelerator=h200 videos=8",
        ),
        reports=True,
        rest="overrides",
    ),
    "data build": Command(
        "choose the clips to train on from videos and captions",
        "ospnext.data.build:BuildConfig",
        "ospnext.data.build:run",
        examples=(
            "data build configs/data/filter.yaml save_path=data/clips",
            "data build data_path=my_videos save_path=data/clips sample_num_frames=33",
        ),
    ),
    "data import": Command(
        "turn a store of OSP-Next's filter into one of ours",
        "ospnext.data.importing:ImportConfig",
        "ospnext.data.importing:run",
        arguments=("src", "save_path"),
        examples=("data import old/dataset data/clips",),
    ),
    "data encode": Command(
        "make VAE latents and text embeddings of a store once, for training",
        "ospnext.prepare.encode:EncodeConfig",
        "ospnext.prepare.encode:run",
        examples=("data encode metafile_or_dir_path=data/clips save_path=data/latents model=shapes",),
    ),
    "data check": Command(
        "decode a sample of a store and draw it with its captions",
        "ospnext.data.check:CheckConfig",
        "ospnext.data.check:run",
        arguments=("store",),
        examples=("data check data/clips num_clips=32",),
    ),
}
