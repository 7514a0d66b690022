//! The network of a run: a bridge, and for each node a namespace with an address of its own.
//!
//! ```text
//!   harness, clients            node 1 (ajID-1)     node 2 (ajID-2)
//!   198.18.S.254                198.18.S.1          198.18.S.2
//!        └────── bridge ajID ───────┴───────────────────┘
//! ```
//!
//! What a node must not hear is dropped in its own namespace, as it comes in: so a partition may
//! be of one direction. Clients hear everybody, always.

use std::path::Path;

use super::{claim::Claim, tool};
use crate::cluster::Error;

/// Third bytes of a subnet that may be tried: 198.18.0.0/15 is set aside for measurements (RFC 2544).
const SUBNET_COUNT: u32 = 512;
/// The harness's own end.
const HARNESS: u8 = 254;
/// In each namespace.
const TABLE: &str = "inet arqon_jepsen";

/// What a node is to miss of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drop {
    /// Who does not get it.
    pub at: u64,
    /// Whose packets.
    pub from: u64,
    /// Of a hundred packets; 100 is a partition.
    pub percent: u8,
}

/// The namespaces and addresses of a run.
#[derive(Clone, Debug)]
pub struct Network {
    claim: Claim,
    /// Second and third byte.
    subnet: (u8, u8),
    nodes: Vec<u64>,
}

impl Network {
    /// Makes the bridge and a namespace for each node.
    ///
    /// # Errors
    /// The step that the system refused.
    pub async fn create(claim: &Claim, nodes: &[u64]) -> Result<Self, Error> {
        let subnet = free_subnet(claim.pid).await?;
        let network = Self { claim: claim.clone(), subnet, nodes: nodes.to_vec() };
        let bridge = claim.bridge();
        let mut steps = vec![
            format!("link add {bridge} type bridge"),
            format!("addr add {}/24 dev {bridge}", network.host(HARNESS)),
            format!("link set {bridge} up"),
        ];
        for node in nodes {
            let (namespace, cable) = (claim.namespace(*node), claim.cable(*node));
            tool::run("ip", &["netns", "add", &namespace], "").await?;
            steps.push(format!("link add {cable} type veth peer name eth0 netns {namespace}"));
            steps.push(format!("link set {cable} master {bridge} up"));
        }
        tool::run("ip", &["-batch", "-"], &steps.join("\n")).await?;
        for node in nodes {
            let address = network.address(*node);
            let steps = format!("addr add {address}/24 dev eth0\nlink set eth0 up\nlink set lo up\n");
            tool::run("ip", &["-netns", &claim.namespace(*node), "-batch", "-"], &steps).await?;
        }
        Ok(network)
    }

    fn host(&self, last: u8) -> String {
        format!("198.{}.{}.{last}", self.subnet.0, self.subnet.1)
    }

    /// The address of a node.
    #[must_use]
    pub fn address(&self, node: u64) -> String {
        self.host(u8::try_from(node).unwrap_or(HARNESS - 1).min(HARNESS - 1))
    }

    /// What to run in front of a program so that it runs on a node: the mounts stay everybody's.
    #[must_use]
    pub fn enter(&self, node: u64) -> [String; 2] {
        ["nsenter".to_owned(), format!("--net={}", Path::new("/run/netns").join(self.claim.namespace(node)).display())]
    }

    /// Drops packets by `drops` from now on, and nothing else.
    ///
    /// # Errors
    /// nft refuses.
    pub async fn drop_packets(&self, drops: &[Drop]) -> Result<(), Error> {
        for node in &self.nodes {
            let of_node: Vec<&Drop> = drops.iter().filter(|drop| drop.at == *node).collect();
            if of_node.is_empty() {
                continue;
            }
            let mut rules = format!("table {TABLE} {{\nchain in {{\ntype filter hook input priority 0;\n");
            for drop in of_node {
                let some = if drop.percent >= 100 {
                    String::new()
                } else {
                    format!("numgen random mod 100 < {} ", drop.percent)
                };
                rules.push_str(&format!("ip saddr {} {some}counter drop\n", self.address(drop.from)));
            }
            rules.push_str("}\n}\n");
            self.nft(*node, &["-f", "-"], &rules).await?;
        }
        Ok(())
    }

    /// Drops nothing any more. Gives how many packets were dropped.
    ///
    /// # Errors
    /// nft refuses.
    pub async fn drop_nothing(&self) -> Result<u64, Error> {
        let mut count = 0;
        for node in &self.nodes {
            let tables = self.nft(*node, &["list", "ruleset"], "").await?;
            count += dropped(&tables);
            if tables.contains(TABLE) {
                self.nft(*node, &["delete", "table", "inet", "arqon_jepsen"], "").await?;
            }
        }
        Ok(count)
    }

    async fn nft(&self, node: u64, args: &[&str], input: &str) -> Result<String, Error> {
        let namespace = self.claim.namespace(node);
        let mut all = vec!["netns", "exec", &namespace, "nft"];
        all.extend(args);
        tool::run("ip", &all, input).await
    }

    /// Slows what leaves `node` down to `kbit_per_second`; what waits longer than `delay_ms_max` is dropped.
    ///
    /// # Errors
    /// tc refuses.
    pub async fn slow(&self, node: u64, kbit_per_second: u32, delay_ms_max: u32) -> Result<(), Error> {
        let (rate, delay) = (format!("{kbit_per_second}kbit"), format!("{delay_ms_max}ms"));
        let args =
            ["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate, "burst", "16kb", "latency", &delay];
        self.tc(node, &args).await.map(|_| ())
    }

    /// Full speed again. Gives how often a packet had to wait.
    ///
    /// # Errors
    /// tc refuses.
    pub async fn full_speed(&self, node: u64) -> Result<u64, Error> {
        let shown = self.tc(node, &["-s", "qdisc", "show", "dev", "eth0"]).await?;
        if !shown.contains("tbf") {
            return Ok(0);
        }
        self.tc(node, &["qdisc", "delete", "dev", "eth0", "root"]).await?;
        Ok(number_after(&shown, "overlimits "))
    }

    async fn tc(&self, node: u64, args: &[&str]) -> Result<String, Error> {
        let namespace = self.claim.namespace(node);
        let mut all = vec!["-netns", &namespace];
        all.extend(args);
        tool::run("tc", &all, "").await
    }
}

/// A subnet that no interface here has; runs of other processes begin their search elsewhere.
async fn free_subnet(pid: u32) -> Result<(u8, u8), Error> {
    let taken = tool::run("ip", &["-oneline", "-4", "addr"], "").await?;
    for step in 0..SUBNET_COUNT {
        let number = (pid + step) % SUBNET_COUNT;
        let subnet = (18 + (number / 256) as u8, (number % 256) as u8);
        if !taken.contains(&format!("198.{}.{}.", subnet.0, subnet.1)) {
            return Ok(subnet);
        }
    }
    Err(Error::new("all subnets of 198.18.0.0/15 are in use"))
}

fn number_after(text: &str, word: &str) -> u64 {
    let digits = |text: &str| text.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or("").parse().ok();
    text.split_once(word).and_then(|(_, rest)| digits(rest)).unwrap_or(0)
}

/// Packets that the rules of a namespace dropped.
fn dropped(ruleset: &str) -> u64 {
    let rules = ruleset.lines().filter(|line| line.contains("counter packets ") && line.contains("drop"));
    rules.map(|line| number_after(line, "counter packets ")).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_rules_are_added() {
        let ruleset = "table inet arqon_jepsen {\n chain in {\n type filter hook input priority filter; policy accept;\n \
            ip saddr 198.18.1.2 counter packets 12 bytes 900 drop\n \
            ip saddr 198.18.1.3 numgen random mod 100 < 5 counter packets 30 bytes 1 drop\n }\n}\n";
        assert_eq!(dropped(ruleset), 42);
        assert_eq!(dropped(""), 0);
        assert_eq!(number_after("dropped 3, overlimits 77 requeues 0", "overlimits "), 77);
    }
}
