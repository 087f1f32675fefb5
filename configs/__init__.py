"""Shipped configurations; `pack-ptq configs` lists them."""
