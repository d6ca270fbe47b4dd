"""Networks: the U-Net trained here and those of EDM and EDM2."""
