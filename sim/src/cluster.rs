//! The brokers of a run, and what clients need to reach them.

use std::{collections::BTreeSet, path::Path};

use arqon_proto::{Claims, TokenAlgorithm, TokenKeyPair, TokenSigner};
use arqon_sdk::{Client, Options};
use arqon_spine::{Auth, AuthKey, Config, Listen, Log, Peer, Secret, Storage};

use crate::{
    machine::{Machine, small_options},
    random::Random,
    system::{HostId, WALL_START_MS},
    world::World,
};

/// The tenant of all clients.
const TENANT: &str = "lab";
const AUDIENCE: &str = "arqonbus";
const CLIENT_PORT: u16 = 7700;
const PEER_PORT: u16 = 7701;
const CONTROL_PORT: u16 = 7702;
const ADMIN_PORT: u16 = 7703;
/// A cluster may grow to as many nodes, if it does not begin with more.
const GROWN_COUNT: u8 = 5;

/// Why a run cannot begin.
pub type SetupError = Box<dyn std::error::Error>;

/// See the module.
pub struct Cluster {
    /// By number, from 1; those too that are not in the cluster, with empty disks.
    pub machines: Vec<Machine>,
    /// Indices of those that are in the cluster, from when they are started to join it.
    pub members: BTreeSet<usize>,
    /// What clients are told: the nodes that formed the cluster, and a token.
    pub access: Access,
}

/// Where the brokers are, and a token for them.
#[derive(Clone)]
pub struct Access {
    servers: Vec<String>,
    controls: Vec<String>,
    token: String,
}

impl Access {
    /// Options of a client that reaches all brokers.
    #[must_use]
    pub fn options(&self) -> Options {
        Options::new(self.servers.clone(), self.token.clone())
    }

    /// A client that connects when it is used.
    ///
    /// # Panics
    /// The addresses above are wrong.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::lazy(self.options()).expect("addresses of the simulation are well formed")
    }

    /// The control plane of a node by its index, as a URL.
    #[must_use]
    pub fn control(&self, index: usize) -> String {
        format!("http://{}", self.controls[index % self.controls.len()])
    }

    /// What goes into a request's `authorization`.
    #[must_use]
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }
}

fn address(number: u8, port: u16) -> String {
    format!("127.0.0.{number}:{port}")
}

fn config(number: u8, count: u8, public_key_file: &Path) -> Config {
    let peer = |number: u8| Peer {
        node: u64::from(number),
        client: address(number, CLIENT_PORT),
        peer: address(number, PEER_PORT),
        control: address(number, CONTROL_PORT),
    };
    Config {
        node: u64::from(number),
        cluster: "sim".to_owned(),
        data: "memory".into(),
        dev: false,
        bootstrap: false,
        program: "sim".to_owned(),
        threads: None,
        cluster_secret: Some(Secret("the nodes of a simulation know this".to_owned())),
        cluster_secret_file: None,
        listen: Listen {
            client: address(number, CLIENT_PORT),
            peer: address(number, PEER_PORT),
            control: address(number, CONTROL_PORT),
            admin: address(number, ADMIN_PORT),
        },
        auth: Auth {
            audience: AUDIENCE.to_owned(),
            keys: vec![AuthKey {
                kid: None,
                algorithm: TokenAlgorithm::EdDSA,
                public_key_file: public_key_file.to_owned(),
            }],
        },
        tls: None,
        storage: Storage::default(),
        log: Log::default(),
        // Whoever comes later knows those that formed the cluster.
        peers: (1..=count).chain((number > count).then_some(number)).map(peer).collect(),
    }
}

impl Cluster {
    /// A cluster of `count` brokers that do not run yet, and room for more. `folder` takes a key file.
    ///
    /// # Errors
    /// The file cannot be written, or no key made.
    pub fn new(count: u8, folder: &Path, random: &mut Random) -> Result<Self, SetupError> {
        let pair = TokenKeyPair::generate()?;
        let public_key_file = folder.join("token.pem");
        std::fs::write(&public_key_file, &pair.public_key_pem)?;
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, pair.private_key_pem.as_bytes())?;
        let now = WALL_START_MS / 1_000;
        let token = signer.mint(&Claims {
            sub: "sim".to_owned(),
            tenant_id: TENANT.to_owned(),
            aud: AUDIENCE.to_owned(),
            // Clocks may be an hour off.
            exp: now + 24 * 3_600,
            iat: now - 3_600,
            role: "admin".to_owned(),
            // Members, moves and leaders are changed too.
            permissions: vec!["admin:cluster".to_owned()],
        })?;
        let options = small_options(random);
        let machine =
            |number| Machine::new(number, config(number, count, &public_key_file), options.clone(), random.fork());
        let capacity = count.max(GROWN_COUNT);
        let machines = (1..=capacity).map(machine).collect();
        let members = (0..usize::from(count)).collect();
        let some = |count, port| (1..=count).map(|number| address(number, port)).collect();
        Ok(Self {
            machines,
            members,
            access: Access { servers: some(count, CLIENT_PORT), controls: some(capacity, CONTROL_PORT), token },
        })
    }

    /// Starts all brokers of the cluster that do not run.
    pub fn boot_all(&mut self, world: &mut World) {
        for index in &self.members {
            let machine = &mut self.machines[*index];
            if !world.is_up(machine.host()) {
                machine.boot(world);
            }
        }
    }

    /// What clients are told that come now: all members but one, which perhaps waits to be let in.
    #[must_use]
    pub fn access_now(&self, but: Option<usize>) -> Access {
        let settled = self.members.iter().filter(|index| Some(**index) != but);
        let servers = settled.map(|index| address(self.machines[*index].number, CLIENT_PORT)).collect();
        Access { servers, ..self.access.clone() }
    }

    /// Where the brokers of the cluster are in the network.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostId> {
        self.members.iter().map(|index| self.machines[*index].host()).collect()
    }

    /// The machine of all clients but the workers.
    #[must_use]
    pub fn clients(&self) -> HostId {
        HostId(self.machines.len() as u8 + 1)
    }

    /// The machine of a worker, from 0.
    #[must_use]
    pub fn worker(&self, number: u8) -> HostId {
        HostId(self.clients().0 + 1 + number)
    }
}
