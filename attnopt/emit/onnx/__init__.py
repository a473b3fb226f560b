"""ONNX files whose attentions are fused nodes. Needs the extra ``onnx``."""
