"""Basics for all layers: durable files, safe text, errors, paths, progress events. Nothing about models."""
