"""ONNX files as captured graphs: the second front end beside ``torch.export``. Needs the extra ``onnx``."""
