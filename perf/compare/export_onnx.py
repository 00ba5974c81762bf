"""ONNX files for Infinity's optimum engine, made with Infinity's own Python, which has optimum.

``python export_onnx.py CHECKPOINT FOLDER`` writes the checkpoints FOLDER/fp32 and FOLDER/int8 with an ONNX file each;
int8 is optimum's dynamic quantization for CPUs with VNNI.
"""

import shutil
import sys
from pathlib import Path

from optimum.onnxruntime import (
    AutoQuantizationConfig,
    ORTModelForSequenceClassification,
    ORTQuantizer,
)


def main(checkpoint: Path, folder: Path) -> None:
    """Export the model, then quantize it."""
    exact, quantized = folder / "fp32", folder / "int8"
    for each in (exact, quantized):
        shutil.copytree(checkpoint, each)
    ORTModelForSequenceClassification.from_pretrained(checkpoint, export=True).save_pretrained(exact)
    recipe = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(exact, file_name="model.onnx").quantize(save_dir=quantized, quantization_config=recipe)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
