"""quality: what truncating saved KV costs in a trained model's predictions (front door: truncation_quality)."""
