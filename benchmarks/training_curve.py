"""Chart of the embedded model's training, from the logs in docs/data: ``python benchmarks/training_curve.py``."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
BATCH_SIZE = 320  # of every stage


def read(name: str) -> list[dict]:
    """The lines of a training log."""
    return [json.loads(line) for line in (DOCS / "data" / f"{name}.jsonl").read_text().splitlines()]


def main() -> None:
    """Write docs/media/training.png."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    vae = read("shapes_vae")
    left.semilogy([line["step"] for line in vae], [line["mse"] for line in vae])
    left.set(title="video VAE", xlabel="step", ylabel="squared error of a sampled reconstruction")
    seen = 0.0
    for i in (1, 2, 3):
        log = read(f"shapes_transformer_{i}")
        clips = [seen + line["step"] * BATCH_SIZE / 1e6 for line in log]
        right.semilogy(clips, [line["loss"] for line in log], label=f"run {i}")
        seen = clips[-1]
    right.set(title="transformer", xlabel="million clips seen", ylabel="squared error of the velocity")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "media" / "training.png", dpi=110)


if __name__ == "__main__":
    main()
