"""The model: vision encoder, backbone, insulation, action expert, and the parameters that tie them together."""
