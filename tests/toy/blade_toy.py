"""A whole third-party plugin: a scheduler, a drafter, a logits processor, a route and a command."""

from blade import Draft, JSONResponse, OrderedScheduler, hookimpl


class Lifo(OrderedScheduler):
    """Last come, first served."""

    def key(self, seq):
        return (-seq.arrival, -seq.id)


class Repeat:
    """Guesses that the last token comes again."""

    def propose(self, seqs, limits):
        return [
            Draft(seq.tokens(seq.num_tokens - 1, seq.num_tokens) * limit)
            for seq, limit in zip(seqs, limits, strict=True)
        ]

    def forget(self, seq):
        pass


@hookimpl
def register_schedulers(register):
    register("lifo", Lifo)


@hookimpl
def register_drafters(register):
    register("repeat", lambda config, draft_model: Repeat())


@hookimpl
def register_logits_processors(register):
    def ban(token_ids, tokenizer):
        def process(output_ids, logits):
            logits[token_ids] = -float("inf")

        return process

    register("ban", ban)


@hookimpl
def register_routes(register):
    async def steps(server, request):
        return JSONResponse({"model": server.model_name, "steps": server.engine.stats().steps})

    register("GET /toy/steps", steps)


@hookimpl
def register_commands(cli):
    def greet(name):
        """Say hello."""
        print("hello", name)

    cli.command(greet)
