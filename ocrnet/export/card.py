"""MODEL_CARD.md: what an exported file is, for people."""

from pathlib import Path

from ocrnet.export.compare import Figures
from ocrnet.export.formats import Facts

INPUTS = {
    "uint8": "uint8 N,H,W,3: RGB as it is read from a file, 0 to 255; normalised inside",
    "normalised": "float32 N,3,H,W: RGB, (value / 255 - mean) / std",
}
OUTPUTS = {
    "labels": "uint8 N,H,W: the class index of each pixel",
    "probabilities": "float32 N,C,H,W: the softmax over the classes, at the image's size",
    "logits": "float32 N,C,ceil(H/4),ceil(W/4): before resizing (bilinear, align_corners {align_corners}) and argmax",
}
MINDIR = "two of float32 N,C,ceil(H/4),ceil(W/4): the auxiliary head's logits, and the OCR head's, which are the answer"


def card(facts: Facts, figures: Figures, name: str) -> str:
    """Return the card's Markdown."""
    size = "any, height and width at least 32; any batch" if facts.size is None else "{}x{}".format(*facts.size)
    answer = MINDIR if facts.format == "mindir" else OUTPUTS[facts.outputs].format(align_corners=facts.align_corners)
    rows = {
        "format": f"{facts.format}, {facts.precision}",
        "network": f"OCRNet-HRNet-W{facts.arch.width}, variant {facts.arch.variant}",
        "input": INPUTS[facts.input],
        "size (height x width)": size if facts.size is None else f"{size}, a batch of 1",
        "mean, std (of values 0 to 1)": f"{list(facts.mean)}, {list(facts.std)}",
        "output": answer,
        "from": f"`{facts.source['file']}`, step {facts.source['step']}, sha256 `{facts.source['sha256']}`",
        "written with": ", ".join(f"{library} {version}" for library, version in facts.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    classes = "\n".join(
        f"| {i} | {label} | {' '.join(map(str, colour))} |"
        for i, (label, colour) in enumerate(zip(facts.names, facts.palette, strict=True))
    )
    return (
        f"# {name}\n\n| | |\n| --- | --- |\n{table}\n\n## Compared with its checkpoint\n\nRun with "
        f"{facts.comparison['runtime']}: {figures.text()}. Images: {facts.comparison['on']}.\n\n"
        f"## Classes\n\n| index | name | RGB |\n| --- | --- | --- |\n{classes}\n"
    )


def card_path(output: Path) -> Path:
    """Return where the card of a file lies."""
    return output.with_name(f"{output.name}.MODEL_CARD.md")
