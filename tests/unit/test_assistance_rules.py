"""The rules of assistance: both state machines, the retry policy, the routes."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assistance import events
from assistance.delivery import (
    ACTIVE_STATES,
    ATTEMPTS_USED_UP,
    HINT_PATIENCE_CAP_SECONDS,
    HINT_PATIENCE_SECONDS,
    OPEN_STATES,
    PERMANENT,
    Ask,
    Delivery,
    DeliveryState,
    Failed,
    Succeeded,
    TryAgain,
    UnknownRule,
    birth,
    conclude,
    hint_patience_seconds,
    is_active,
    next_look_at,
)
from assistance.request import (
    Status,
    accept,
    delivery_to,
    next_due_at,
    status_of,
)
from assistance.retry_policy import RetryPolicy
from assistance.routing import (
    RESERVED_NAMES,
    Destination,
    RoutingError,
    RoutingTable,
    check_routing,
)
from assistance.verdict import Done, Later, Never, Unknown
from consumers.channels.excerpts import EXCERPT_MAX_CHARACTERS, cut_excerpt
from consumers.channels.http import retry_after_seconds
from outbox import envelope
from outbox.errors import UndecodableBody

NOW = datetime(2026, 11, 23, 10, 0, tzinfo=UTC)

moments = st.integers(0, 10**6).map(lambda seconds: NOW + timedelta(seconds=seconds))
states = st.sampled_from([state.value for state in DeliveryState])
policies = st.builds(
    RetryPolicy,
    delays_seconds=st.lists(st.floats(0.001, 1e6), max_size=10).map(tuple),
    jitter_ratio=st.floats(0, 1),
    retry_after_cap_seconds=st.floats(0, 1e6),
)
seeds = st.integers()


def delivery(**fields: object) -> Delivery:
    born = birth(destination="slack", channel="slack", idempotency_key="k", hint_event="h", now=NOW)
    return {**born, **fields}  # type: ignore[typeddict-item]  # a test may spoil any field


class TestRetryPolicy:
    @given(policies, seeds, st.data())
    def test_a_scheduled_wait_stays_within_its_jitter(
        self, policy: RetryPolicy, seed: int, data: st.DataObject
    ) -> None:
        attempts_made = data.draw(st.integers(1, policy.attempts_limit))
        wait = policy.delay_seconds(attempts_made, None, random.Random(seed))
        if attempts_made == policy.attempts_limit:
            assert wait is None
        else:
            assert wait is not None
            scheduled = policy.delays_seconds[attempts_made - 1]
            assert scheduled * (1 - policy.jitter_ratio) <= wait * (1 + 1e-9)
            assert wait <= scheduled * (1 + policy.jitter_ratio) * (1 + 1e-9)

    @given(policies, st.none() | st.floats(), st.integers(1, 12), seeds)
    def test_a_third_party_can_only_lengthen_a_wait_and_up_to_the_cap(
        self, policy: RetryPolicy, asked_seconds: float | None, attempts_made: int, seed: int
    ) -> None:
        scheduled = policy.delay_seconds(attempts_made, None, random.Random(seed))
        wait = policy.delay_seconds(attempts_made, asked_seconds, random.Random(seed))
        uncounted = policy.uncounted_delay_seconds(asked_seconds, random.Random(seed))
        plain = policy.uncounted_delay_seconds(None, random.Random(seed))
        assert plain <= uncounted <= max(plain, policy.retry_after_cap_seconds)
        if scheduled is None:
            assert wait is None
        else:
            assert wait is not None
            assert scheduled <= wait <= max(scheduled, policy.retry_after_cap_seconds)
            if asked_seconds is not None and asked_seconds <= policy.retry_after_cap_seconds:
                assert wait == max(scheduled, asked_seconds)

    @given(st.text(st.sampled_from("0123456789 -+.eE:,GMTMonNov")) | st.text(), seeds)
    def test_no_retry_after_header_shortens_a_wait(self, header: str, seed: int) -> None:
        asked_seconds = retry_after_seconds(header, NOW)
        policy = RetryPolicy()
        for attempts_made in range(1, policy.attempts_limit):
            wait = policy.delay_seconds(attempts_made, asked_seconds, random.Random(seed))
            assert wait is not None
            shortest = policy.delays_seconds[attempts_made - 1] * (1 - policy.jitter_ratio)
            assert shortest * (1 - 1e-9) <= wait <= policy.retry_after_cap_seconds * 1.2

    def test_waits_that_do_not_count_grow_with_the_schedule_and_never_end(self) -> None:
        policy = RetryPolicy(jitter_ratio=0)
        waits = [
            policy.uncounted_delay_seconds(None, random.Random(0), attempts_in_all=made)
            for made in range(1, 20)
        ]
        assert waits[:7] == list(policy.delays_seconds)
        assert set(waits[7:]) == {policy.delays_seconds[-1]}

    @given(policies, st.integers(0, 100), seeds)
    def test_used_up_attempts_stay_used_up(self, policy: RetryPolicy, more: int, seed: int) -> None:
        attempts_made = policy.attempts_limit + more
        assert policy.delay_seconds(attempts_made, 1.0, random.Random(seed)) is None

    def test_the_default_schedule_grows_over_eight_attempts(self) -> None:
        policy = RetryPolicy()
        assert policy.attempts_limit == 8
        assert list(policy.delays_seconds) == sorted(policy.delays_seconds)


class TestDelivery:
    def test_it_is_born_waiting_due_at_once_and_hinted(self) -> None:
        born = delivery()
        assert (born["state"], born["due_at"], born["fence"]) == ("waiting", NOW, 0)
        assert (born["attempts"], born["lease_until"]) == ([], None)
        assert next_look_at(born) == NOW + timedelta(seconds=HINT_PATIENCE_SECONDS)

    @given(policies, st.integers(1, 12), seeds)
    def test_done_succeeds_and_never_fails_for_good(
        self, policy: RetryPolicy, attempts_made: int, seed: int
    ) -> None:
        def concluded(verdict: Done | Never) -> object:
            return conclude(
                verdict,
                attempts_made=attempts_made,
                policy=policy,
                now=NOW,
                randomness=random.Random(seed),
            )

        assert concluded(Done("200")) == Succeeded()
        assert concluded(Never("404")) == Failed(PERMANENT)

    @given(policies, st.integers(1, 12), seeds, st.sampled_from([Later("503"), Unknown("reset")]))
    def test_later_and_unknown_are_tried_again_until_the_attempts_are_used_up(
        self, policy: RetryPolicy, attempts_made: int, seed: int, verdict: Later | Unknown
    ) -> None:
        conclusion = conclude(
            verdict,
            attempts_made=attempts_made,
            policy=policy,
            now=NOW,
            randomness=random.Random(seed),
        )
        if attempts_made >= policy.attempts_limit:
            assert conclusion == Failed(ATTEMPTS_USED_UP)
        else:
            assert isinstance(conclusion, TryAgain)
            assert conclusion.due_at >= NOW

    @given(policies, st.integers(0, 12), seeds, st.none() | st.floats(0, 1e6))
    def test_what_does_not_count_fails_nothing(
        self, policy: RetryPolicy, attempts_made: int, seed: int, asked_seconds: float | None
    ) -> None:
        conclusion = conclude(
            Later("lease_spent", retry_after_seconds=asked_seconds, counts=False),
            attempts_made=attempts_made,
            policy=policy,
            now=NOW,
            randomness=random.Random(seed),
        )
        assert isinstance(conclusion, TryAgain)
        assert conclusion.due_at >= NOW

    @given(policies, st.integers(1, 12), st.integers(1, 12), seeds)
    def test_an_unknown_outcome_is_repeated_rarely_and_late_and_then_a_person_is_asked(
        self, policy: RetryPolicy, attempts_made: int, unknown_outcomes: int, seed: int
    ) -> None:
        conclusion = conclude(
            Unknown("reset"),
            attempts_made=attempts_made,
            unknown_outcomes=unknown_outcomes,
            policy=policy,
            now=NOW,
            randomness=random.Random(seed),
            on_unknown=UnknownRule.RARELY,
        )
        if unknown_outcomes > 2 or attempts_made >= policy.attempts_limit:
            assert conclusion == Ask()
        else:
            assert isinstance(conclusion, TryAgain)
            wait = (conclusion.due_at - NOW).total_seconds()
            late = (900.0, 14400.0)[unknown_outcomes - 1]
            assert late * (1 - policy.jitter_ratio) - 1 <= wait
            assert wait <= late * (1 + policy.jitter_ratio) + 1

    @given(policies, st.integers(1, 12))
    def test_a_person_is_asked_about_an_unknown_outcome_where_that_is_the_rule(
        self, policy: RetryPolicy, attempts_made: int
    ) -> None:
        def concluded(verdict: Later | Unknown) -> object:
            return conclude(
                verdict,
                attempts_made=attempts_made,
                policy=policy,
                now=NOW,
                randomness=random.Random(0),
                on_unknown=UnknownRule.ASK,
            )

        assert concluded(Unknown("reset")) == Ask()
        assert isinstance(concluded(Later("503")), TryAgain | Failed)

    def test_retry_after_decides_when(self) -> None:
        conclusion = conclude(
            Later("429", retry_after_seconds=90.0),
            attempts_made=1,
            policy=RetryPolicy(),
            now=NOW,
            randomness=random.Random(0),
        )
        assert conclusion == TryAgain(NOW + timedelta(seconds=90))

    @given(moments, moments, st.none() | moments, states)
    def test_the_reconciler_looks_once_nothing_is_owed_before(
        self, due_at: datetime, hint_until: datetime, lease_until: datetime | None, state: str
    ) -> None:
        changed = delivery(
            due_at=due_at, hint_until=hint_until, lease_until=lease_until, state=state
        )
        look_at = next_look_at(changed)
        assert (look_at is None) == (not is_active(changed))
        if look_at is not None:
            owed = [due_at, hint_until] + ([lease_until] if lease_until else [])
            assert look_at in owed
            assert all(look_at >= moment for moment in owed)

    @given(st.integers(1, 10_000))
    def test_each_further_hint_is_trusted_longer_up_to_an_hour(self, hints_sent: int) -> None:
        patience = hint_patience_seconds(hints_sent)
        assert HINT_PATIENCE_SECONDS <= patience <= HINT_PATIENCE_CAP_SECONDS
        following = hint_patience_seconds(hints_sent + 1)
        assert following == min(2 * patience, HINT_PATIENCE_CAP_SECONDS)


class TestRequest:
    @given(st.lists(states, min_size=1, max_size=5))
    def test_its_status_is_what_its_deliveries_add_up_to(self, delivery_states: list[str]) -> None:
        status = status_of(delivery_states)
        is_any_open = any(state in OPEN_STATES for state in delivery_states)
        assert (status is Status.ACCEPTED) == is_any_open
        assert (status is Status.SUCCEEDED) == (set(delivery_states) == {"succeeded"})
        assert (status is Status.FAILED) == (not is_any_open and "failed" in delivery_states)

    @given(st.permutations(["waiting", "claimed", "succeeded", "failed"]))
    def test_the_order_of_deliveries_does_not_matter(self, delivery_states: list[str]) -> None:
        assert status_of(delivery_states) is status_of(sorted(delivery_states))

    @given(st.lists(st.tuples(moments, states), max_size=5))
    def test_the_reconciler_looks_at_its_first_delivery_first(
        self, deliveries: list[tuple[datetime, str]]
    ) -> None:
        changed = [delivery(due_at=at, hint_until=at, state=state) for at, state in deliveries]
        expected = min((at for at, state in deliveries if state in ACTIVE_STATES), default=None)
        assert next_due_at(changed) == expected

    @given(st.integers(1, 6))
    def test_it_is_accepted_with_one_fact_and_one_hint_a_delivery(self, count: int) -> None:
        destinations = [Destination(f"place-{number}", "slack") for number in range(count)]
        acceptance = accept(
            request_id="r", topic="sales", description="x", destinations=destinations, now=NOW
        )
        request, (fact, *hints) = acceptance.request, acceptance.outbox_documents

        assert request["status"] == Status.ACCEPTED
        assert request["version"] == 1 + count
        assert [event["seq"] for event in (fact, *hints)] == list(range(1, count + 2))
        assert (fact["type"], fact["must_route"]) == (events.CREATED, False)
        assert fact["routing_key"] == "assistance_request_created.sales"
        for destination, born, hint in zip(destinations, request["deliveries"], hints, strict=True):
            assert delivery_to(request, destination.name) is born
            assert born["hint_event"] == hint["_id"]
            assert (hint["type"], hint["must_route"]) == (events.HINT, True)
            assert hint["routing_key"] == f"delivery_due.{destination.name}"
            read = events.read_hint(hint["payload"].encode())
            assert read == (hint["_id"], "r", destination.name)
        keys = {born["idempotency_key"] for born in request["deliveries"]}
        assert len(keys) == count

    def test_its_fact_tells_what_happened_to_whom(self) -> None:
        (fact, _) = accept(
            request_id="r",
            topic="sales",
            description="a private matter",
            destinations=[Destination("slack", "slack")],
            now=NOW,
        ).outbox_documents
        decoded = envelope.decode(fact["payload"].encode())
        assert (decoded.id, decoded.type, decoded.subject) == (fact["_id"], events.CREATED, "r")
        assert decoded.data == {"request_id": "r", "topic": "sales", "status": "accepted"}

    def test_a_fact_is_no_hint(self) -> None:
        context = events.EventContext("r", NOW)
        fact = events.fact(events.CREATED, context, topic="sales", status="accepted", seq=1)
        with pytest.raises(UndecodableBody, match="not a hint"):
            events.read_hint(fact["payload"].encode())


names = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True).filter(
    lambda name: name not in RESERVED_NAMES
)


class TestRouting:
    @given(st.dictionaries(names, names, min_size=1, max_size=5), st.data())
    def test_sound_routes_lead_each_topic_to_its_destinations(
        self, channels: dict[str, str], data: st.DataObject
    ) -> None:
        routes = data.draw(
            st.dictionaries(
                names,
                st.lists(st.sampled_from(sorted(channels)), min_size=1, unique=True),
                min_size=1,
                max_size=4,
            )
        )
        routing = check_routing(channels, routes)
        assert routing.topics == tuple(routes)
        for topic, destination_names in routes.items():
            assert [
                (destination.name, destination.channel)
                for destination in routing.destinations_of(topic)
            ] == [(name, channels[name]) for name in destination_names]

    def test_every_problem_is_named_at_once(self) -> None:
        with pytest.raises(RoutingError) as refused:
            check_routing(
                {"Slack": "slack", "reconciler": "slack", "email": "email"},
                {
                    "a.b": ["email"],
                    " ": ["email"],
                    "empty": [],
                    "twice": ["email", "email"],
                    "lost": ["nowhere"],
                },
            )
        message = str(refused.value)
        for expected in (
            "'Slack': a name is lower-case",
            "'reconciler': this name is taken",
            "'a.b': a topic is a word without dots",
            "' ': a topic is a word without dots",
            "'empty' has no destination",
            "'twice' names a destination twice",
            "'lost' goes to 'nowhere', which is not a destination; known: Slack, email, reconciler",
        ):
            assert expected in message
        assert len(message.splitlines()) == 7

    def test_routes_to_nowhere_are_refused(self) -> None:
        with pytest.raises(RoutingError, match="no topic is routed anywhere"):
            check_routing({"slack": "slack"}, {})

    def test_the_default_routes_are_those_of_the_contract(self) -> None:
        routing = RoutingTable().routing
        assert routing.topics == ("sales", "pricing")
        assert routing.destinations_of("sales") == (Destination("slack", "slack"),)
        assert routing.destinations_of("pricing") == (Destination("email", "email"),)


class TestVerdict:
    @given(st.text(max_size=1000))
    def test_an_excerpt_is_one_line_of_bounded_length(self, text: str) -> None:
        excerpt = cut_excerpt(text)
        assert len(excerpt) <= EXCERPT_MAX_CHARACTERS
        assert excerpt.isprintable()
        if len(excerpt) < EXCERPT_MAX_CHARACTERS and text.replace("\n", " ").isprintable():
            assert excerpt.split() == text.split()

    def test_an_excerpt_steers_no_terminal(self) -> None:
        assert cut_excerpt("a\x1b[2Jb\r\n\u202ec\x00") == "a\\x1b[2Jb \\u202ec\\x00"
