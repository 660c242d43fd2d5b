"""The measured targets: Aerie and the systems it is compared with."""
