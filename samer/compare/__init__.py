"""Every compressor compared at one budget and with the same training."""
