"""The dashboard of an SAE: what each of its features is, as one page."""
