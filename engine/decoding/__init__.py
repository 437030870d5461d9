"""From logits to tokens, and from tokens to where a sequence ends."""
