"""KV events of engines that publish over ZeroMQ: vLLM, SGLang, and Mooncake's store."""
