//! The end of a demo, as text and as JSON.

use serde_json::{Value, json};

use super::verdict::Verdict;

/// What happened.
#[derive(Debug)]
pub struct Summary {
    /// Jobs that were acknowledged.
    pub jobs: usize,
    /// What the replicas hold.
    pub verdict: Verdict,
    /// Weakest promise of an acknowledgement.
    pub durability: &'static str,
    /// Node that was killed.
    pub node_killed: u64,
    /// Jobs that it had leased out then.
    pub leased_at_node_kill: u64,
    /// From its kill to the next acknowledged job on a partition that it led.
    pub failover_ms: f64,
    /// Jobs leased when the shim was killed.
    pub leased_at_shim_kill: u64,
    /// From sending a job to its acknowledgement.
    pub publish_ms: (f64, f64),
    /// From sending a job to seeing its result.
    pub job_ms: (f64, f64),
    /// Duration of the run.
    pub seconds: f64,
}

impl Summary {
    /// Whether every job has its one true result, and something was redelivered.
    #[must_use]
    pub fn passed(&self) -> bool {
        let verdict = &self.verdict;
        verdict.lost == 0
            && verdict.duplicates == 0
            && verdict.failed == 0
            && verdict.results == self.jobs
            && verdict.redelivered >= 1
            && verdict.replicas_agree
    }

    /// The document of `--json`.
    #[must_use]
    pub fn document(&self) -> Value {
        json!({
            "passed": self.passed(),
            "jobs": self.jobs,
            "results": self.verdict.results,
            "lost": self.verdict.lost,
            "duplicates": self.verdict.duplicates,
            "redelivered": self.verdict.redelivered,
            "failed": self.verdict.failed,
            "replicas_agree": self.verdict.replicas_agree,
            "node_killed": self.node_killed,
            "leased_at_node_kill": self.leased_at_node_kill,
            "failover_ms": round(self.failover_ms),
            "shim_killed": true,
            "leased_at_shim_kill": self.leased_at_shim_kill,
            "durability": self.durability,
            "publish_p50_ms": round(self.publish_ms.0),
            "publish_p99_ms": round(self.publish_ms.1),
            "job_p50_ms": round(self.job_ms.0),
            "job_p99_ms": round(self.job_ms.1),
            "seconds": round(self.seconds),
            "errors": self.verdict.errors,
        })
    }

    /// The lines for a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let verdict = &self.verdict;
        let agree = if verdict.replicas_agree { "all three replicas agree" } else { "the replicas differ" };
        let mut text = format!(
            "jobs         {}\nresults      {} ({agree}, each redrawn from its seed)\nlost         {}\n\
             duplicates   {}\nfailed       {}\nredelivered  {}\nerrors       {}\n\
             node killed  {} (jobs leased: {}), next acknowledgement after {:.0} ms\n\
             shim killed  (jobs leased: {})\ndurability   {}\n\
             publish      p50 {:.1} ms, p99 {:.1} ms\njob          p50 {:.1} ms, p99 {:.1} ms\ntime         {:.1} s\n",
            self.jobs,
            verdict.results,
            verdict.lost,
            verdict.duplicates,
            verdict.failed,
            verdict.redelivered,
            verdict.errors.len(),
            self.node_killed,
            self.leased_at_node_kill,
            self.failover_ms,
            self.leased_at_shim_kill,
            self.durability,
            self.publish_ms.0,
            self.publish_ms.1,
            self.job_ms.0,
            self.job_ms.1,
            self.seconds,
        );
        for error in &verdict.errors {
            text.push_str(&format!("  error: {error}\n"));
        }
        text.push_str(if self.passed() { "\nEvery job has its one result." } else { "\nFAILED" });
        text
    }
}

fn round(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Summary {
        Summary {
            jobs: 3,
            verdict: Verdict { results: 3, redelivered: 1, replicas_agree: true, ..Verdict::default() },
            durability: "majority-fsync",
            node_killed: 2,
            leased_at_node_kill: 4,
            failover_ms: 812.34,
            leased_at_shim_kill: 4,
            publish_ms: (1.0, 2.0),
            job_ms: (3.0, 4.0),
            seconds: 5.0,
        }
    }

    #[test]
    fn only_a_flawless_run_passes() {
        assert!(good().passed());
        let flaws: [fn(&mut Summary); 6] = [
            |summary| summary.verdict.lost = 1,
            |summary| summary.verdict.duplicates = 1,
            |summary| summary.verdict.failed = 1,
            |summary| summary.verdict.results = 2,
            |summary| summary.verdict.redelivered = 0,
            |summary| summary.verdict.replicas_agree = false,
        ];
        for flaw in flaws {
            let mut summary = good();
            flaw(&mut summary);
            assert!(!summary.passed(), "{summary:?}");
            assert_eq!(summary.document()["passed"], false);
        }
    }

    #[test]
    fn the_document_has_what_scripts_ask_for() {
        let document = good().document();
        for name in ["jobs", "results", "lost", "duplicates", "redelivered", "failed", "node_killed", "failover_ms"] {
            assert!(document[name].is_number(), "{name}");
        }
        assert_eq!(document["failover_ms"], 812.3);
        assert_eq!(document["durability"], "majority-fsync");
    }
}
