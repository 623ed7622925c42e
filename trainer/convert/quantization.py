"""Which quantized weights can be read, by the section of a config.json. Imports no torch."""

from trainer.config.nodes import shown


def quantization_problem(section: object) -> str | None:
    """Return why weights that are quantized as a config.json says cannot be read; None if they can."""
    method = section.get("quant_method") if isinstance(section, dict) else None
    if not isinstance(section, dict) or method not in ("fp8", "mxfp4"):
        return f"its weights are quantized ({shown(method)}); fp8 in blocks and mxfp4 are read: dequantize it first"
    if method == "mxfp4":
        return None
    size = section.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= 1 << 16 for n in size):
        return f"weight_block_size: {shown(size)} is not two numbers; only fp8 in blocks is read: dequantize it first"
    if section.get("fmt", "e4m3") != "e4m3":
        return f"fmt: {shown(section['fmt'])}; only e4m3 is read: dequantize it first"
    return None
