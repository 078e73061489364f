"""An edited model for programs that do not know reknow."""
