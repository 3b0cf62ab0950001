"""MODEL_CARD.md, which describes an exported file for its users."""

from pathlib import Path

from ocrnet.export.compare import Comparison
from ocrnet.export.formats import ExportMetadata

INPUTS = {
    "uint8": "uint8 N,H,W,3: RGB as read from a file, 0 to 255; normalized inside the network",
    "normalized": "float32 N,3,H,W: RGB, (value / 255 - mean) / std",
}
OUTPUTS = {
    "labels": "uint8 N,H,W: the class index of each pixel",
    "probabilities": "float32 N,C,H,W: the softmax over the classes, at the size of the image",
    "logits": "float32 N,C,ceil(H/4),ceil(W/4): before resizing (bilinear, align_corners {align_corners}) and argmax",
}
MINDIR = (
    "two outputs float32 N,C,ceil(H/4),ceil(W/4): the logits of the auxiliary head, and those of the OCR head, which "
    "are the prediction"
)


def card(metadata: ExportMetadata, comparison: Comparison, name: str) -> str:
    """Return the model card as Markdown.

    Args:
        metadata: The metadata of the exported file.
        comparison: The comparison with the checkpoint.
        name: The name of the exported file, used as the title.

    Returns:
        The text of the card.
    """
    size = "any, height and width at least 32; any batch" if metadata.size is None else "{}x{}".format(*metadata.size)
    output = (
        MINDIR
        if metadata.format == "mindir"
        else OUTPUTS[metadata.outputs].format(align_corners=metadata.align_corners)
    )
    rows = {
        "format": f"{metadata.format}, {metadata.precision}",
        "network": f"OCRNet-HRNet-W{metadata.arch.width}, variant {metadata.arch.variant}",
        "input": INPUTS[metadata.input],
        "size (height x width)": size if metadata.size is None else f"{size}, a batch of 1",
        "mean, std (of values 0 to 1)": f"{list(metadata.mean)}, {list(metadata.std)}",
        "output": output,
        "from": f"`{metadata.source['file']}`, step {metadata.source['step']}, sha256 `{metadata.source['sha256']}`",
        "written with": ", ".join(f"{library} {version}" for library, version in metadata.versions.items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    classes = "\n".join(
        f"| {i} | {label} | {' '.join(map(str, color))} |"
        for i, (label, color) in enumerate(zip(metadata.names, metadata.palette, strict=True))
    )
    return (
        f"# {name}\n\n| | |\n| --- | --- |\n{table}\n\n## Comparison with its checkpoint\n\nRun in "
        f"{metadata.comparison['runtime']}: {comparison.text()}. Images: {metadata.comparison['on']}.\n\n"
        f"## Classes\n\n| index | name | RGB |\n| --- | --- | --- |\n{classes}\n"
    )


def card_path(output: Path) -> Path:
    """Return the path of the model card of an exported file."""
    return output.with_name(f"{output.name}.MODEL_CARD.md")
