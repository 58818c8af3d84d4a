"""The server: `torchrun -m rq_ep.serve`, an OpenAI-compatible HTTP process in front of one engine on every rank."""
