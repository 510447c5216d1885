"""Other wires for the same calls: Anthropic's Messages and OpenAI's Responses, translated to chat completions."""
