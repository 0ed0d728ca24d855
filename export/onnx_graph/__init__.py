"""The ONNX graph of a model, emitted from its config and its tensors, and verified in onnxruntime."""
