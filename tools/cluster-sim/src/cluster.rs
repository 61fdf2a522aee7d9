//! The cluster: who asks whom for which piece, and what that takes.
//!
//! An image's bytes come in pieces of at most 1 MiB. A lazy start by ranges asks for the next piece once it has used the one
//! before; a pull and a hot pack are streams, whose pieces come whether they are used yet or not.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use crate::fluid::{Resource, Simulation};
use crate::model::{Calibration, Cluster, Start, Strategy};

/// The largest piece, in bytes.
const PIECE: u64 = 1 << 20;
/// Of a tree: how many hosts each host gives to.
const CHILDREN: usize = 2;

type Sim = Simulation<World>;
type Then = Box<dyn FnOnce(&mut Sim)>;

/// What was simulated.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// Seconds to the first output of each container, sorted.
    pub(crate) first_output_s: Vec<f64>,
    /// What left the registry.
    pub(crate) registry_bytes: f64,
    pub(crate) registry_requests: u64,
}

/// Simulates a start of all containers at once on hosts that have nothing of the image.
pub(crate) fn simulate(
    calibration: &Calibration,
    cluster: &Cluster,
    strategy: Strategy,
) -> Outcome {
    let mut sim = Simulation::new(World::empty(calibration, cluster, strategy));
    build(&mut sim);
    for host in 0..cluster.hosts {
        pull(&mut sim, host, 0);
    }
    sim.run();
    let mut first_output_s = std::mem::take(&mut sim.world.done);
    first_output_s.sort_by(f64::total_cmp);
    assert_eq!(
        first_output_s.len(),
        cluster.hosts * cluster.containers,
        "a container has not started"
    );
    Outcome {
        first_output_s,
        registry_bytes: sim.world.registry_bytes,
        registry_requests: sim.world.registry_requests,
    }
}

/// A part of an answer.
#[derive(Debug, Clone, Copy)]
struct Piece {
    bytes: u64,
    /// It is the first of its answer.
    asked: bool,
    /// It comes without being asked for, behind the one before.
    streamed: bool,
    /// It is the last of its answer, which has so many bytes.
    completes: Option<u64>,
}

/// Where a piece is on its way to somebody.
enum Place {
    Coming(Vec<Then>),
    Here,
}

/// The pieces that somebody has or will have, by number, those of the pull first.
#[derive(Default)]
struct Pieces(HashMap<usize, Place>);

/// Whether a piece is there for one who needs it.
enum Need {
    Here(Then),
    Coming,
    /// It has to be fetched.
    Absent,
}

impl Pieces {
    /// Keeps what is to be done until the piece is there; gives it back where it is.
    fn need(&mut self, number: usize, then: Then) -> Need {
        match self.0.get_mut(&number) {
            Some(Place::Here) => Need::Here(then),
            Some(Place::Coming(waiting)) => {
                waiting.push(then);
                Need::Coming
            }
            None => {
                self.0.insert(number, Place::Coming(vec![then]));
                Need::Absent
            }
        }
    }

    /// It is there: what is to be done now.
    fn arrived(&mut self, number: usize) -> Vec<Then> {
        match self.0.insert(number, Place::Here) {
            Some(Place::Coming(waiting)) => waiting,
            Some(Place::Here) | None => Vec::new(),
        }
    }
}

struct Server {
    link: Resource,
    cpu: Resource,
}

struct Host {
    down: Resource,
    up: Resource,
    cpu: Resource,
    pieces: Pieces,
}

struct Mirror {
    server: Server,
    down: Resource,
    pieces: Pieces,
}

struct World {
    cluster: Cluster,
    strategy: Strategy,
    request_s: f64,
    byte_s: f64,
    start: Start,
    pull: Vec<Piece>,
    starting: Vec<Piece>,
    registry: Option<Server>,
    mirrors: Vec<Mirror>,
    hosts: Vec<Host>,
    done: Vec<f64>,
    registry_bytes: f64,
    registry_requests: u64,
}

impl World {
    fn empty(calibration: &Calibration, cluster: &Cluster, strategy: Strategy) -> Self {
        let start = calibration.start(strategy).clone();
        // The pack of a hot start is its largest answer.
        let pack = match strategy {
            Strategy::Full | Strategy::Ranges => None,
            Strategy::Hot | Strategy::Mirrors | Strategy::Tree => start.start.iter().max().copied(),
        };
        World {
            pull: start
                .pull
                .iter()
                .flat_map(|bytes| pieces(*bytes, true))
                .collect(),
            starting: start
                .start
                .iter()
                .flat_map(|bytes| pieces(*bytes, Some(*bytes) == pack))
                .collect(),
            cluster: cluster.clone(),
            strategy,
            request_s: calibration.registry_request_s,
            byte_s: calibration.registry_byte_s,
            start,
            registry: None,
            mirrors: Vec::new(),
            hosts: Vec::new(),
            done: Vec::new(),
            registry_bytes: 0.0,
            registry_requests: 0,
        }
    }

    fn piece(&self, number: usize) -> Piece {
        let own = number.checked_sub(self.pull.len());
        own.map_or_else(|| self.pull[number], |number| self.starting[number])
    }

    fn registry(&self) -> &Server {
        self.registry.as_ref().expect("the cluster was built")
    }
}

/// An answer's pieces.
fn pieces(bytes: u64, streamed: bool) -> Vec<Piece> {
    let whole = bytes.div_ceil(PIECE).max(1);
    (0..whole)
        .map(|number| Piece {
            bytes: PIECE.min(bytes - number * PIECE),
            asked: number == 0,
            streamed: streamed && number > 0,
            completes: (number + 1 == whole).then_some(bytes),
        })
        .collect()
}

fn build(sim: &mut Sim) {
    let cluster = sim.world.cluster.clone();
    let shared = cluster.shared_cpus.map(|cpus| sim.resource(cpus));
    let cpu = |sim: &mut Sim, cpus: f64| shared.unwrap_or_else(|| sim.resource(cpus));
    let registry = Server {
        link: sim.resource(cluster.registry_link),
        cpu: cpu(sim, cluster.registry_cpus),
    };
    sim.world.registry = Some(registry);
    for _ in 0..cluster.hosts {
        let host = Host {
            down: sim.resource(cluster.host_link),
            up: sim.resource(cluster.host_link),
            cpu: cpu(sim, cluster.host_cpus),
            pieces: Pieces::default(),
        };
        sim.world.hosts.push(host);
    }
    if sim.world.strategy == Strategy::Mirrors {
        for _ in 0..cluster.hosts.div_ceil(cluster.hosts_per_mirror.max(1)) {
            let mirror = Mirror {
                server: Server {
                    link: sim.resource(cluster.mirror_link),
                    cpu: cpu(sim, cluster.mirror_cpus),
                },
                down: sim.resource(cluster.mirror_link),
                pieces: Pieces::default(),
            };
            sim.world.mirrors.push(mirror);
        }
    }
}

/// Pulls from that piece on, and starts the containers behind the last.
fn pull(sim: &mut Sim, host: usize, number: usize) {
    let pieces = sim.world.pull.len();
    if number == pieces {
        for _ in 0..sim.world.cluster.containers {
            step(sim, host, 0);
        }
        stream(sim, host, pieces);
        return;
    }
    let bytes: u64 = sim.world.pull.iter().map(|piece| piece.bytes).sum();
    let cpu = sim.world.hosts[host].cpu;
    let Some(answer) = sim.world.piece(number).completes else {
        return need(sim, host, number, move |sim| pull(sim, host, number + 1));
    };
    let work = sim.world.start.pull_cpu_s * answer as f64 / bytes as f64;
    // A blob is unpacked when it is here and checked, while the next one comes; the last is waited for.
    let last = number + 1 == pieces;
    need(sim, host, number, move |sim| {
        if last {
            sim.work(work, &[cpu], 1.0, move |sim| pull(sim, host, number + 1));
        } else {
            sim.work(work, &[cpu], 1.0, |_| ());
            pull(sim, host, number + 1);
        }
    });
}

/// Has the pieces come that follow an answer's first without being asked for.
fn stream(sim: &mut Sim, host: usize, number: usize) {
    let all = sim.world.pull.len() + sim.world.starting.len();
    let asked = (number..all).find(|number| {
        let next = (number + 1 < all).then(|| sim.world.piece(number + 1));
        next.is_some_and(|next| next.streamed)
    });
    if let Some(first) = asked {
        follow(sim, host, first);
    }
}

fn follow(sim: &mut Sim, host: usize, number: usize) {
    need(sim, host, number, move |sim| {
        let all = sim.world.pull.len() + sim.world.starting.len();
        if number + 1 < all && sim.world.piece(number + 1).streamed {
            follow(sim, host, number + 1);
        }
    });
}

/// One container goes on: it needs a piece, uses it, and needs the next.
fn step(sim: &mut Sim, host: usize, taken: usize) {
    let steps = sim.world.starting.len();
    let work = sim.world.start.start_cpu_s / steps.max(1) as f64;
    let cpu = sim.world.hosts[host].cpu;
    if steps == 0 {
        return sim.work(work, &[cpu], 1.0, started);
    }
    if taken == steps {
        return started(sim);
    }
    let number = sim.world.pull.len() + taken;
    need(sim, host, number, move |sim| {
        sim.work(work, &[cpu], 1.0, move |sim| step(sim, host, taken + 1));
    });
}

/// A container has written its first line.
fn started(sim: &mut Sim) {
    let now = sim.now();
    sim.world.done.push(now);
}

/// Does that once the host has the piece, which comes once for all that need it.
fn need(sim: &mut Sim, host: usize, number: usize, then: impl FnOnce(&mut Sim) + 'static) {
    match sim.world.hosts[host].pieces.need(number, Box::new(then)) {
        Need::Here(then) => sim.after(0.0, then),
        Need::Coming => {}
        Need::Absent => fetch(sim, host, number),
    }
}

fn arrived(sim: &mut Sim, host: usize, number: usize) {
    for then in sim.world.hosts[host].pieces.arrived(number) {
        then(sim);
    }
}

fn fetch(sim: &mut Sim, host: usize, number: usize) {
    let down = sim.world.hosts[host].down;
    match sim.world.strategy {
        Strategy::Mirrors => {
            let mirror = host / sim.world.cluster.hosts_per_mirror.max(1);
            from_mirror(sim, mirror, host, number);
        }
        Strategy::Tree if host > 0 => {
            let parent = (host - 1) / CHILDREN;
            let up = sim.world.hosts[parent].up;
            let bytes = sim.world.piece(number).bytes as f64;
            wait_for(sim, parent, number, move |sim| {
                sim.work(bytes, &[up, down], f64::INFINITY, move |sim| {
                    arrived(sim, host, number)
                });
            });
        }
        _ => from_registry(sim, down, number, move |sim| arrived(sim, host, number)),
    }
}

/// Does that once another host has the piece: it needs it itself, sooner or later.
fn wait_for(sim: &mut Sim, host: usize, number: usize, then: impl FnOnce(&mut Sim) + 'static) {
    let round_trip = match sim.world.piece(number).asked {
        true => sim.world.cluster.round_trip_s,
        false => 0.0,
    };
    sim.after(round_trip, move |sim| need(sim, host, number, then));
}

/// An answer of the registry, over its link and that one.
fn from_registry(
    sim: &mut Sim,
    down: Resource,
    number: usize,
    then: impl FnOnce(&mut Sim) + 'static,
) {
    let piece = sim.world.piece(number);
    let (link, cpu) = (sim.world.registry().link, sim.world.registry().cpu);
    sim.world.registry_bytes += piece.bytes as f64;
    sim.world.registry_requests += u64::from(piece.asked);
    answer(sim, piece, cpu, [link, down], then);
}

fn from_mirror(sim: &mut Sim, mirror: usize, host: usize, number: usize) {
    let piece = sim.world.piece(number);
    let (down, server) = (
        sim.world.hosts[host].down,
        &sim.world.mirrors[mirror].server,
    );
    let (link, cpu) = (server.link, server.cpu);
    let give: Then = Box::new(move |sim: &mut Sim| {
        answer(sim, piece, cpu, [link, down], move |sim| {
            arrived(sim, host, number)
        });
    });
    let mirror_down = sim.world.mirrors[mirror].down;
    match sim.world.mirrors[mirror].pieces.need(number, give) {
        Need::Here(give) => give(sim),
        Need::Coming => {}
        Need::Absent => from_registry(sim, mirror_down, number, move |sim| {
            for give in sim.world.mirrors[mirror].pieces.arrived(number) {
                give(sim);
            }
        }),
    }
}

/// A piece from a server: the way there and the request's work where it is asked for, then its bytes over both links
/// while the server works for them.
fn answer(
    sim: &mut Sim,
    piece: Piece,
    cpu: Resource,
    links: [Resource; 2],
    then: impl FnOnce(&mut Sim) + 'static,
) {
    let (round_trip, request) = match piece.asked {
        true => (sim.world.cluster.round_trip_s, sim.world.request_s),
        false => (0.0, 0.0),
    };
    let work = sim.world.byte_s * piece.bytes as f64;
    sim.after(round_trip, move |sim| {
        sim.work(request, &[cpu], 1.0, move |sim| {
            let open = Rc::new(Cell::new(2));
            let then: Rc<Cell<Option<Then>>> = Rc::new(Cell::new(Some(Box::new(then))));
            let one = move |open: Rc<Cell<i32>>, then: Rc<Cell<Option<Then>>>| {
                move |sim: &mut Sim| {
                    open.set(open.get() - 1);
                    if open.get() == 0 {
                        then.take().expect("it ends once")(sim);
                    }
                }
            };
            sim.work(work, &[cpu], 1.0, one(open.clone(), then.clone()));
            sim.work(piece.bytes as f64, &links, f64::INFINITY, one(open, then));
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 MB/s for the registry, 10 MB/s for a host; 8 MiB of which 1 MiB is needed, no work to speak of.
    fn calibration() -> Calibration {
        let start = |pull: Vec<u64>, start: Vec<u64>| Start {
            pull,
            start,
            pull_cpu_s: 0.0,
            start_cpu_s: 0.0,
            first_output_s: 0.0,
        };
        let cluster = Cluster {
            hosts: 1,
            containers: 1,
            registry_link: 100e6,
            mirror_link: 100e6,
            host_link: 10e6,
            round_trip_s: 0.1,
            hosts_per_mirror: 5,
            registry_cpus: 1.0,
            mirror_cpus: 1.0,
            host_cpus: 1.0,
            shared_cpus: None,
        };
        Calibration {
            version: Calibration::VERSION,
            about: String::new(),
            registry_request_s: 0.0,
            registry_byte_s: 0.0,
            full: start(vec![8 * PIECE], Vec::new()),
            ranges: start(vec![1000], vec![PIECE / 8; 8]),
            hot: start(vec![1000], vec![2 * PIECE]),
            together: Vec::new(),
            cluster,
        }
    }

    fn last(strategy: Strategy, hosts: usize) -> f64 {
        let calibration = calibration();
        let cluster = Cluster {
            hosts,
            ..calibration.cluster.clone()
        };
        *simulate(&calibration, &cluster, strategy)
            .first_output_s
            .last()
            .unwrap()
    }

    fn near(found: f64, wanted: f64) {
        assert!((found - wanted).abs() < 1e-3, "{found} instead of {wanted}");
    }

    #[test]
    fn one_host_takes_what_its_link_and_its_requests_take() {
        let mib = PIECE as f64 / 10e6;
        near(last(Strategy::Full, 1), 0.1 + 8.0 * mib);
        // A request for the table, and one for each of eight ranges.
        near(last(Strategy::Ranges, 1), 0.1 + 0.0001 + 8.0 * 0.1 + mib);
        near(last(Strategy::Hot, 1), 0.1 + 0.0001 + 0.1 + 2.0 * mib);
    }

    #[test]
    fn many_hosts_share_the_registrys_link() {
        // 20 hosts could take 200 MB/s of its 100.
        near(
            last(Strategy::Full, 20),
            0.1 + 2.0 * 8.0 * PIECE as f64 / 10e6,
        );
    }

    #[test]
    fn mirrors_and_trees_take_from_the_registry_what_is_needed_once() {
        let calibration = calibration();
        let cluster = Cluster {
            hosts: 20,
            ..calibration.cluster.clone()
        };
        let bytes = |strategy| simulate(&calibration, &cluster, strategy).registry_bytes;
        let once = (2 * PIECE + 1000) as f64;
        near(bytes(Strategy::Hot), 20.0 * once);
        near(bytes(Strategy::Mirrors), 4.0 * once);
        near(bytes(Strategy::Tree), once);
    }

    #[test]
    fn containers_of_a_host_fetch_each_piece_once() {
        let calibration = calibration();
        let cluster = Cluster {
            containers: 10,
            ..calibration.cluster.clone()
        };
        let outcome = simulate(&calibration, &cluster, Strategy::Ranges);
        assert_eq!(outcome.first_output_s.len(), 10);
        assert_eq!(outcome.registry_requests, 9);
    }

    #[test]
    fn a_blob_is_unpacked_when_all_of_it_is_here() {
        let mut calibration = calibration();
        calibration.full.pull_cpu_s = 1.0;
        let outcome = simulate(&calibration, &calibration.cluster, Strategy::Full);
        near(
            outcome.first_output_s[0],
            0.1 + 8.0 * PIECE as f64 / 10e6 + 1.0,
        );
    }

    #[test]
    fn work_of_a_host_is_shared_by_its_containers() {
        let mut calibration = calibration();
        calibration.full.start_cpu_s = 1.0;
        let cluster = Cluster {
            containers: 4,
            host_cpus: 2.0,
            ..calibration.cluster.clone()
        };
        let outcome = simulate(&calibration, &cluster, Strategy::Full);
        near(
            outcome.first_output_s[3],
            0.1 + 8.0 * PIECE as f64 / 10e6 + 2.0,
        );
    }
}
