"""Floor 3: from a Hugging Face checkpoint to ONNX.

Model families, the traceable decoder, keep rules, calibration, training, and the reference that parity is
measured against.
"""
