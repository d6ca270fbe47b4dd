"""How gradients flow through a solve: values passed as `adjoint=`."""
