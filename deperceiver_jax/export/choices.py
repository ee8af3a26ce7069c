"""What the flags of export choose from."""

ENDINGS = {"onnx": ".onnx", "stablehlo": ".stablehlo"}  # of a file, by format
DYNAMIC = "dynamic"  # any number of pictures, any size of their frame
TOLERANCE = 1e-4  # of logits, of boxes in [0, 1], of scores, and of the AP
AP_TOLERANCES = {"float32": TOLERANCE, "float16": 0.003, "bfloat16": 0.003}  # by precision
