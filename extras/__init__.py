"""Programs around the nine files, which import none of them. Run: python -m extras.NAME."""
