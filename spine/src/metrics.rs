//! What a node counts, as Prometheus text. Positions and queues are read at scrape time.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use arqon_proto::{CLIENT_VERSIONS, PEER_VERSIONS, code_name, wire};
use arqon_storage::Histogram;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{broker::Broker, partition::PartitionMetrics};

/// What the edges of a node count.
#[derive(Default)]
pub(crate) struct Metrics {
    pub connections: Gauge,
    pub refused_connections: Counter,
    pub refused_handshakes: Counter,
    pub requests: Counter,
    pub received_size: Counter,
    pub sent_size: Counter,
    refused: Family<Vec<(&'static str, &'static str)>, Counter>,
    /// What partitions count, all of them together.
    pub partitions: Arc<PartitionMetrics>,
}

impl Metrics {
    /// Counts an error answer.
    pub(crate) fn refused(&self, code: wire::ErrorCode) {
        self.refused.get_or_create(&vec![("code", code_name(code))]).inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("connections", "Client connections that stand", self.connections.clone());
        registry.register("refused_connections", "Client connections over the limit", self.refused_connections.clone());
        registry.register(
            "refused_handshakes",
            "Client connections with a bad first frame or token",
            self.refused_handshakes.clone(),
        );
        registry.register("requests", "Requests received", self.requests.clone());
        registry.register_with_unit("received", "Batches received", Unit::Bytes, self.received_size.clone());
        registry.register_with_unit("sent", "Answers sent", Unit::Bytes, self.sent_size.clone());
        registry.register("error_answers", "Requests answered with an error, by its code", self.refused.clone());
    }
}

/// The registry of a node.
pub(crate) fn registry(broker: &Arc<Broker>) -> Registry {
    let mut registry = Registry::with_prefix("arqon");
    broker.metrics.register(&mut registry);
    let told = [
        ("program", broker.program.clone()),
        ("peer_protocol", PEER_VERSIONS.to_string()),
        ("client_protocol", CLIENT_VERSIONS.to_string()),
    ];
    registry.register(
        "build",
        "The program that runs here, and the protocols that it speaks",
        Info::new(told.to_vec()),
    );
    registry.register_collector(Box::new(NodeCollector(Arc::downgrade(broker))));
    registry
}

// Weak: the registry belongs to the admin port, and must not keep the node alive.
struct NodeCollector(Weak<Broker>);

impl fmt::Debug for NodeCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl Collector for NodeCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let Some(broker) = self.0.upgrade() else { return Ok(()) };
        let mut out = Out(encoder);
        out.storage(&broker)?;
        out.partitions(&broker.metrics.partitions)?;
        out.positions(&broker)?;
        out.health(&broker)?;
        out.gauge("operators_live", "Operators that send heartbeats", broker.operators.live_count() as i64)
    }
}

type PartitionLabels = [(&'static str, String); 3];

struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn counter(&mut self, name: &str, help: &str, value: &AtomicU64) -> fmt::Result {
        let counter = ConstCounter::new(value.load(Ordering::Relaxed));
        counter.encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauge(&mut self, name: &str, help: &str, value: i64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        let mut buckets: Vec<(f64, u64)> =
            histogram.buckets().into_iter().map(|(limit_us, count)| (limit_us as f64 / 1e6, count)).collect();
        buckets.push((f64::MAX, 0));
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = histogram.sum_us() as f64 / 1e6;
        let mut encoder = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn storage(&mut self, broker: &Broker) -> fmt::Result {
        let metrics = broker.store.metrics();
        self.counter("log_appended_entries", "Entries appended to logs", &metrics.appended_count)?;
        self.counter("log_written_bytes", "Bytes of entries written to segments", &metrics.written_size)?;
        self.counter("log_flushes", "Flush groups made durable", &metrics.flush_count)?;
        self.counter("log_segments_created", "Segments created", &metrics.roll_count)?;
        self.counter("log_segments_recycled", "Of these, in the file of a purged one", &metrics.recycled_count)?;
        self.gauge("log_pool_bytes", "Bytes of files that wait to be a segment again", load(&metrics.pool_size))?;
        self.counter("log_damaged_reads", "Reads that met damaged entries", &metrics.damaged_read_count)?;
        self.gauge("log_damage", "Ranges of damaged entries known of", load(&metrics.damage_count))?;
        self.counter("log_damage_found", "Ranges of damaged entries found", &metrics.damage_found_count)?;
        self.counter("log_damage_repaired", "Ranges of damaged entries repaired", &metrics.repaired_count)?;
        self.counter("log_scrubbed_bytes", "Bytes that the scrubber has checked", &metrics.scrubbed_size)?;
        self.counter("log_scrub_rounds", "Rounds of the scrubber over all full segments", &metrics.scrub_round_count)?;
        self.gauge("log_queue_entries", "Entries that wait for their flush", load(&metrics.queue_depth))?;
        self.gauge("log_queue_bytes", "Bytes that wait for their flush", load(&metrics.queue_size))?;
        self.gauge("log_poisoned", "Logs closed for writing by a failed write or sync", load(&metrics.poisoned_count))?;
        self.histogram(
            "log_flush",
            "From the write of a flush group to the end of its fdatasync",
            &metrics.flush_latency,
        )?;
        self.histogram(
            "log_append",
            "From the first append of a flush group to the end of its fdatasync",
            &metrics.append_latency,
        )
    }

    fn health(&mut self, broker: &Broker) -> fmt::Result {
        let health = &broker.health;
        let space = health.space();
        let size = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
        self.gauge("disk_free_bytes", "What the disk of the data directory still takes", size(space.free_size))?;
        self.gauge("disk_reserve_bytes", "Below this much free no new records are taken", size(space.reserve_size))?;
        self.gauge("clock_skew_ms", "How far the clock is ahead of the median of the nodes", health.skew_ms())?;
        self.gauge(
            "clock_off",
            "1 while the clock is so wrong that the node leads nothing",
            health.is_clock_off().into(),
        )?;
        self.gauge(
            "clock_lateness_ms",
            "How much later than due the node last looked at the clocks",
            size(health.lateness_ms()),
        )
    }

    fn partitions(&mut self, metrics: &PartitionMetrics) -> fmt::Result {
        self.counter("produce_batches", "Batches committed", &metrics.batch_count)?;
        self.counter("produce_records", "Records committed", &metrics.record_count)?;
        self.counter("produce_bytes", "Bytes committed", &metrics.batch_size)?;
        self.counter("produce_duplicates", "Batches refused as known", &metrics.duplicate_count)?;
        self.counter("overloaded", "Batches and requests pushed back", &metrics.overloaded_count)?;
        self.counter("jobs_granted", "Jobs handed out", &metrics.granted_count)?;
        self.counter("jobs_redelivered", "Jobs handed out again", &metrics.redelivered_count)?;
        self.counter("jobs_expired", "Leases that ran out", &metrics.expired_count)?;
        self.counter("jobs_dead", "Jobs moved to a dead-letter topic", &metrics.dead_count)?;
        self.gauge("jobs_leased", "Jobs leased now on partitions led here", load_signed(&metrics.leased_count))?;
        self.histogram("produce_commit", "From the receipt of a batch to its commit", &metrics.produce_latency)?;
        self.histogram("work", "From a worker's request to its jobs", &metrics.work_latency)
    }

    fn positions(&mut self, broker: &Broker) -> fmt::Result {
        let open = broker.replicas.open();
        let statuses: Vec<(PartitionLabels, wire::PartitionStatus)> = open
            .iter()
            .map(|partition| {
                let topic = partition.topic();
                let labels = [
                    ("tenant", topic.tenant.clone()),
                    ("topic", topic.name.clone()),
                    ("partition", partition.partition().to_string()),
                ];
                (labels, partition.status())
            })
            .collect();
        type Read = fn(&wire::PartitionStatus) -> u64;
        let gauges: [(&str, &str, Read); 5] = [
            ("partition_leader", "1 where this node leads the partition", |status| u64::from(status.leader)),
            ("partition_log_start", "First offset retained", |status| status.log_start),
            ("partition_log_end", "Offset after the last record in the log", |status| status.log_end),
            ("partition_bytes", "Bytes of entries in the local log", |status| status.size),
            ("partition_committed", "Offset after the last record that can be read", |status| status.committed),
        ];
        for (name, help, read) in gauges {
            let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, status) in &statuses {
                ConstGauge::new(read(status) as i64).encode(encoder.encode_family(labels)?)?;
            }
        }
        type ReadQueue = fn(&wire::PartitionStatus, &wire::QueueStatus) -> u64;
        let queue_gauges: [(&str, &str, ReadQueue); 3] = [
            ("queue_lag", "Jobs committed and not settled", |status, queue| {
                status.committed.saturating_sub(queue.floor)
            }),
            ("queue_leased", "Jobs leased", |_, queue| queue.leased),
            ("queue_pending", "Jobs that wait for another attempt", |_, queue| queue.pending),
        ];
        for (name, help, read) in queue_gauges {
            let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, status) in &statuses {
                for queue in &status.queues {
                    let [tenant, topic, partition] = labels.clone();
                    let labels = [tenant, topic, partition, ("group", queue.group.clone())];
                    ConstGauge::new(read(status, queue) as i64).encode(encoder.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn load(value: &AtomicU64) -> i64 {
    i64::try_from(value.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
}

fn load_signed(value: &AtomicI64) -> i64 {
    value.load(Ordering::Relaxed)
}
