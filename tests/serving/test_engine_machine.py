"""A state machine over an engine with little room: whatever happens in any order, memory and answers are right."""

from __future__ import annotations

import tempfile
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tenure.eviction import evict
from tenure.serving import FinishReason, Hint, Request, SchedulerConfig, StorePolicy, Tier

from .engines import RETENTION, answer_without_cache, check_memory, close, fixed_prompt, gates_of, make_engine, tokens

CONFIG = SchedulerConfig(
    max_num_batched_tokens=40, prefill_chunk_size=24, max_num_seqs=4, answer_headroom_tokens=1, page_patience_s=0.05
)
FIXED_TOKENS = 40


def run_machine(model, examples: int = 6) -> None:
    with evict(model, "full", gates=gates_of(model), observe=["retention"]) as session:

        @cache
        def wanted(agent: int, suffix: int, compressed: bool, count: int = 24) -> list[int]:
            how = RETENTION if compressed else None
            return answer_without_cache(session, prompt_of(agent, suffix), how, FIXED_TOKENS, count)

        class Machine(RuleBasedStateMachine):
            """Requests of three agents, which are cancelled, time out, and are preempted; flushes and evictions."""

            @initialize(
                name=st.sampled_from(["lru_reactive", "lru_prefetch", "ste_prefetch"]), compressed=st.booleans(),
                host=st.sampled_from([0.0, 1.0, 4.0]), disk=st.booleans(),
            )  # fmt: skip
            def begin(self, name, compressed, host, disk):
                self.folder = tempfile.TemporaryDirectory()
                self.compressed, self.asked = compressed, {}
                how = RETENTION if compressed else None
                folder = self.folder.name if disk else None
                self.engine = make_engine(session, name, how, prompts=0.7, host=host, disk=folder, config=CONFIG)

            @rule(
                agent=st.integers(0, 2), suffix=st.integers(0, 3), count=st.integers(1, 24), named=st.booleans(),
                timeout=st.sampled_from([None, None, None, 0.001]), policy=st.sampled_from(StorePolicy),
            )  # fmt: skip
            def submit(self, agent, suffix, count, named, timeout, policy):
                options = {"agent": f"agent{agent}", "fixed_tokens": FIXED_TOKENS, "workflow": "ring"} if named else {}
                prompt = prompt_of(agent, suffix)
                one = Request("r", prompt, count, timeout_s=timeout, store_policy=policy, **options)
                self.asked[self.engine.submit(one)] = agent, suffix, named and self.compressed

            @rule(steps=st.integers(1, 6))
            def step(self, steps):
                for _ in range(steps):
                    for one in self.engine.step(0.002):
                        self._take(one)
                    check_memory(self.engine)

            @rule(choice=st.integers(0, 9))
            def cancel(self, choice):
                names = [*self.asked, 10**6]
                self.engine.cancel(names[choice % len(names)])

            @rule(share=st.sampled_from([0.3, 1.0]))
            def evict_some(self, share):
                tiers = self.engine.system.tiers
                tiers.evictor.make_room(Tier.DEVICE, int(share * tiers.capacity()))

            @rule()
            def flush(self):
                self.engine.flush()

            @rule(agent=st.integers(0, 2))
            def prepare(self, agent):
                prompt = prompt_of(agent, 0)[:FIXED_TOKENS]
                self.engine.store(f"agent{agent}", prompt, self.engine.prepare(prompt))

            @rule(agent=st.integers(0, 2), steps=st.floats(0, 5))
            def hint(self, agent, steps):
                self.engine.hint(Hint("kvflow", steps={f"agent{agent}": steps}))

            @invariant()
            def memory_is_counted(self):
                if hasattr(self, "engine"):
                    check_memory(self.engine)
                    self.engine.pages.check()
                    self.engine.system.scheduler.check()

            def _take(self, one):
                answer = wanted(*self.asked.pop(one.number))
                assert one.finish_reason is not FinishReason.FAILED, one.error
                assert one.tokens == answer[: len(one.tokens)]
                if one.finish_reason is FinishReason.ANSWERED:
                    assert one.tokens == answer[: one.request.max_new_tokens]

            def teardown(self):
                if not hasattr(self, "engine"):
                    return
                for _ in range(2000):
                    if not len(self.engine.system.scheduler):
                        break
                    self.step(1)
                assert not len(self.engine.system.scheduler), "every request ends"
                for one in self.engine.step(0.0):
                    self._take(one)
                assert not self.asked
                close(self.engine)
                self.folder.cleanup()

        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=checks,
                database=None,
            ),
        )


def prompt_of(agent: int, suffix: int) -> list[int]:
    return fixed_prompt(agent)[:FIXED_TOKENS] + tokens(300 + suffix, 2 + 3 * suffix)


def test_whatever_happens_memory_and_answers_are_right(tiny_model):
    run_machine(tiny_model("llama", num_hidden_layers=2))
