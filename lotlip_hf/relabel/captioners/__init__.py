"""The models that caption images: a file each."""
