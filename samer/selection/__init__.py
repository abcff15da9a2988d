"""Which captions a training takes: contrastive phrase influence (CPI), and the choices it is held against."""
