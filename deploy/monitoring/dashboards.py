"""The dashboards of training, services and teams."""

from __future__ import annotations

from monitoring.panels import Dashboard, Panel, Query, Row

_HERE = 'namespace="$namespace"'


def _gauge(metric: str, legend: str, labels: str = "") -> Query:
    return Query(f"{metric}{{{_HERE}{labels}}}", legend)


def _rate(metric: str, by: str, labels: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{_HERE}{labels}}}[$__rate_interval]))"


_RUN = Row(
    "What the policy learns",
    (
        Panel(
            "Scores",
            (
                _gauge("ppod_reward_score_mean", "reward model"),
                _gauge("ppod_judge_score_mean", "held-out judge"),
                _gauge("ppod_reward_score_running_mean", "reward model, of the run so far"),
            ),
            description="The judge is never trained against: where it stays behind, the reward model is being gamed.",
        ),
        Panel(
            "KL to the reference, nats a token",
            (
                _gauge("run:ppod_kl:per_token_nats", "KL"),
                _gauge("ppod_kl_bound_per_token_nats", "bound: watch.kl_per_token"),
            ),
            description="Over its bound the alert PpodKlOverBound fires.",
        ),
        Panel(
            "KL coefficient and update",
            (
                _gauge("ppod_kl_coefficient", "coefficient of the penalty"),
                _gauge("ppod_policy_update_kl_nats", "KL of the step's update, nats a token"),
            ),
        ),
        Panel("Entropy, nats a token", (_gauge("ppod_policy_entropy_nats", "policy"),)),
        Panel(
            "Shares of tokens and samples",
            (
                _gauge("ppod_policy_clip_fraction_ratio", "tokens clipped"),
                _gauge("ppod_response_truncated_ratio", "responses cut off"),
                _gauge("ppod_groups_uniform_ratio", "prompts whose samples are paid the same"),
                _gauge("ppod_response_distinct_2_ratio", "different bigrams"),
            ),
            unit="percentunit",
        ),
        Panel("Response length, tokens", (_gauge("ppod_response_length_tokens", "mean"),)),
        Panel(
            "Losses",
            (_gauge("ppod_policy_loss", "policy"), _gauge("ppod_value_loss", "value")),
        ),
        Panel("Explained variance of the values", (_gauge("ppod_value_explained_variance_ratio", "values"),)),
        Panel("Gradient norm", (_gauge("ppod_policy_grad_norm", "before clipping"),)),
    ),
)

_SOUND = Row(
    "Whether the figures can be trusted",
    (
        Panel(
            "Sampler against trainer, nats a token",
            (
                _gauge("ppod_sampler_logprob_gap_nats", "same weights, mean"),
                _gauge("ppod_sampler_divergence_nats", "all tokens, mean"),
            ),
            description="The first is numerical, and small; the second holds what older weights sampled, too.",
        ),
        Panel("First minibatch: largest |ratio - 1|", (_gauge("ppod_policy_first_ratio_error", "error"),)),
        Panel("Trouble", (_gauge("ppod_trouble", "{{kind}}"),), description="1 where the last step shows it."),
        Panel(
            "Samples left out of a step",
            (
                _gauge("ppod_samples_dropped", "refused by a service"),
                _gauge("ppod_samples_stale", "too old"),
                _gauge("ppod_samples_rejected_short", "too short"),
                _gauge("ppod_samples_rejected_repetitive", "repetitive"),
                _gauge("ppod_samples_rejected_unsafe", "unsafe"),
            ),
        ),
        Panel(
            "Versions of the weights",
            (
                Query(f"max(ppod_policy_version{{{_HERE}}})", "policy"),
                _gauge("ppod_weight_version", "generation {{pod}}", ', component="generation"'),
            ),
        ),
        Panel("Age of the samples' weights, updates", (_gauge("ppod_sampler_staleness_max_updates", "oldest"),)),
    ),
)

_SPEED = Row(
    "How fast",
    (
        Panel("Seconds of the last step, by phase", (_gauge("ppod_step_phase_seconds", "{{phase}}"),), unit="s"),
        Panel("Bytes of the last push of weights", (_gauge("ppod_push_bytes", "bytes"),), unit="bytes"),
        Panel(
            "Replicas, in the last push of weights",
            (
                _gauge("ppod_push_fallbacks", "sent whole weights after all"),
                _gauge("ppod_push_lost_replicas", "gone on without"),
            ),
        ),
        Panel("Response tokens trained on, a second", (_gauge("ppod_tokens_per_second", "tokens"),)),
        Panel(
            "Since the last step",
            (Query(f"time() - ppod_last_step_timestamp_seconds{{{_HERE}}}", "seconds"),),
            unit="s",
        ),
        Panel(
            "Calls to the services, 99th percentile",
            (
                Query(
                    f"histogram_quantile(0.99, {_rate('ppod_client_rpc_seconds_bucket', 'method, le')})", "{{method}}"
                ),
            ),
            unit="s",
        ),
        Panel(
            "Failed calls, a second",
            (Query(_rate("ppod_client_rpc_failures_total", "method, code"), "{{method}} {{code}}"),),
        ),
        Panel("Steps done", (_gauge("ppod_step", "steps"),)),
    ),
)

TRAINING = Dashboard("ppod-training", "ppod: training", (_RUN, _SOUND, _SPEED))

_CALLS = Row(
    "Calls",
    (
        Panel("Replicas that take calls", (Query(f"sum by (component) (ppod_ready{{{_HERE}}})", "{{component}}"),)),
        Panel("Calls, a second", (Query(_rate("ppod_rpc_total", "component, code"), "{{component}} {{code}}"),)),
        Panel(
            "Broken calls",
            (_gauge("component:ppod_rpc_broken:ratio_rate5m", "{{component}}"),),
            unit="percentunit",
            description="INTERNAL and its like, of all calls. The alert PpodErrorRate fires at 1%.",
        ),
        Panel(
            "Seconds of a call, 99th percentile",
            (_gauge("component:ppod_rpc_seconds:p99_5m", "{{component}} {{method}}"),),
            unit="s",
        ),
        Panel(
            "Refused for overload",
            (_gauge("component:ppod_refused:ratio_rate5m", "{{component}}"),),
            unit="percentunit",
        ),
        Panel(
            "Sequences dropped before they cost compute, a second",
            (Query(_rate("ppod_dropped_sequences_total", "component, reason"), "{{component}} {{reason}}"),),
        ),
    ),
)

_WORK = Row(
    "Queues and batches",
    (
        Panel(
            "Queue, of its capacity",
            (_gauge("instance:ppod_queue:saturation", "{{pod}}"),),
            unit="percentunit",
            description="The alert PpodQueueSaturated fires at 80%.",
        ),
        Panel("Sequences that wait", (_gauge("ppod_queue_sequences", "{{pod}}"),)),
        Panel(
            "Busy",
            (_gauge("instance:ppod_compute:busy_ratio_rate5m", "{{pod}}"),),
            unit="percentunit",
            description="Seconds of model execution in a second. Near 100% a replica can do no more: add one.",
        ),
        Panel(
            "Batch, of the most that it may have",
            (_gauge("instance:ppod_batch_fill:mean_rate5m", "{{pod}}"),),
            unit="percentunit",
        ),
        Panel(
            "Tokens computed, a second",
            (
                Query(_rate("ppod_batch_tokens_sum", "component"), "{{component}}"),
                Query(_rate("ppod_padding_tokens_total", "component"), "{{component}} padding"),
            ),
        ),
        Panel(
            "Sequences of a batch, mean",
            (
                Query(
                    f"{_rate('ppod_batch_sequences_sum', 'component')} / "
                    f"{_rate('ppod_batch_sequences_count', 'component')}",
                    "{{component}}",
                ),
            ),
        ),
    ),
)

SERVICES = Dashboard("ppod-services", "ppod: services", (_CALLS, _WORK))

_SHARE = Row(
    "Who gets what",
    (
        Panel("Tokens served, a second", (_gauge("team:ppod_served_tokens:rate5m", "{{component}} {{team}}"),)),
        Panel(
            "Quota used",
            (_gauge("team:ppod_quota_use:ratio_rate5m", "{{component}} {{team}}"),),
            unit="percentunit",
            description="Of the quota at all replicas together: each replica gives a team its whole quota.",
        ),
        Panel(
            "Tokens that wait",
            (Query(f"sum by (component, team) (ppod_team_queue_tokens{{{_HERE}}})", "{{component}} {{team}}"),),
        ),
        Panel(
            "Wait for the first batch, 99th percentile",
            (_gauge("team:ppod_queue_seconds:p99_5m", "{{component}} {{team}}"),),
            unit="s",
        ),
        Panel(
            "Refusals, a second",
            (Query(_rate("ppod_team_refused_total", "component, team, reason"), "{{component}} {{team}} {{reason}}"),),
        ),
        Panel(
            "Calls, a second",
            (Query(_rate("ppod_team_rpc_total", "component, team, code"), "{{component}} {{team}} {{code}}"),),
        ),
    ),
)

TEAMS = Dashboard("ppod-teams", "ppod: teams", (_SHARE,))

ALL = (TRAINING, SERVICES, TEAMS)
