"""The laws of Residual DropPath: properties over generated architectures, checked against an explicit oracle."""
