//! A discrete-event simulation of work that flows: jobs share what they use, links and processors, max-min fairly.
//!
//! Progressive filling as in Bertsekas and Gallager, "Data Networks", 6.5.2: all jobs' rates grow alike until a resource is
//! full or a job has what it can take; these stay, the others grow on.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};

/// What jobs share: a link in bytes a second, or processors in seconds of work a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Resource(usize);

/// Seconds within which two ends are one.
const INSTANT: f64 = 1e-9;

/// What happens then.
type Then<W> = Box<dyn FnOnce(&mut Simulation<W>)>;

struct Job<W> {
    uses: Vec<Resource>,
    left: f64,
    most: f64,
    rate: f64,
    /// Since when it has that rate, in seconds.
    since: f64,
    /// Counts the rates that it had: an end that was foretold by an earlier one is none.
    version: u64,
    then: Then<W>,
}

enum Kind<W> {
    Timer(Then<W>),
    /// Those of the jobs that depend on each other which end first, with the versions of their rates.
    Ends(Vec<(usize, u64)>),
}

struct Event<W> {
    at: f64,
    number: u64,
    kind: Kind<W>,
}

impl<W> PartialEq for Event<W> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<W> Eq for Event<W> {}
impl<W> PartialOrd for Event<W> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<W> Ord for Event<W> {
    // The earliest comes first, and of equal ones that which was known first.
    fn cmp(&self, other: &Self) -> Ordering {
        let times = other.at.total_cmp(&self.at);
        times.then(other.number.cmp(&self.number))
    }
}

/// The world `W`, and what happens in it.
pub(crate) struct Simulation<W> {
    /// What is simulated.
    pub(crate) world: W,
    now: f64,
    numbers: u64,
    events: BinaryHeap<Event<W>>,
    capacities: Vec<f64>,
    users: Vec<BTreeSet<usize>>,
    jobs: Vec<Option<Job<W>>>,
    free: Vec<usize>,
    /// Of these the users have changed in this instant, and their rates not yet.
    changed: BTreeSet<Resource>,
}

impl<W> Simulation<W> {
    pub(crate) fn new(world: W) -> Self {
        Simulation {
            world,
            now: 0.0,
            numbers: 0,
            events: BinaryHeap::new(),
            capacities: Vec::new(),
            users: Vec::new(),
            jobs: Vec::new(),
            free: Vec::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Seconds since the beginning.
    pub(crate) fn now(&self) -> f64 {
        self.now
    }

    /// A resource that does so much a second.
    pub(crate) fn resource(&mut self, capacity: f64) -> Resource {
        assert!(capacity > 0.0, "a resource that does nothing");
        self.capacities.push(capacity);
        self.users.push(BTreeSet::new());
        Resource(self.capacities.len() - 1)
    }

    /// Does that in so many seconds.
    pub(crate) fn after(&mut self, seconds: f64, then: impl FnOnce(&mut Self) + 'static) {
        self.push(self.now + seconds, Kind::Timer(Box::new(then)));
    }

    /// Does so much work with all of these at once, at most so much of it a second, and then that.
    pub(crate) fn work(
        &mut self,
        amount: f64,
        uses: &[Resource],
        most: f64,
        then: impl FnOnce(&mut Self) + 'static,
    ) {
        if amount <= 0.0 {
            return self.after(0.0, then);
        }
        let job = Job {
            uses: uses.to_vec(),
            left: amount,
            most,
            rate: 0.0,
            since: self.now,
            version: 0,
            then: Box::new(then),
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.jobs[index] = Some(job);
                index
            }
            None => {
                self.jobs.push(Some(job));
                self.jobs.len() - 1
            }
        };
        for resource in uses {
            self.users[resource.0].insert(index);
            self.changed.insert(*resource);
        }
    }

    /// Goes on until nothing happens any more.
    pub(crate) fn run(&mut self) {
        loop {
            // All that happens in one instant changes rates once.
            if self.events.peek().is_none_or(|next| next.at > self.now) {
                self.share();
            }
            let Some(event) = self.events.pop() else {
                return;
            };
            match event.kind {
                Kind::Timer(then) => {
                    self.now = event.at;
                    then(self);
                }
                Kind::Ends(jobs) => {
                    for (job, version) in jobs {
                        if self.jobs[job]
                            .as_ref()
                            .is_some_and(|job| job.version == version)
                        {
                            self.now = event.at;
                            self.end(job);
                        }
                    }
                }
            }
        }
    }

    fn push(&mut self, at: f64, kind: Kind<W>) {
        self.numbers += 1;
        let number = self.numbers;
        self.events.push(Event { at, number, kind });
    }

    fn end(&mut self, index: usize) {
        let job = self.jobs[index].take().expect("it has not ended yet");
        for resource in &job.uses {
            self.users[resource.0].remove(&index);
            self.changed.insert(*resource);
        }
        self.free.push(index);
        (job.then)(self);
    }

    /// All jobs whose rates depend on those of the users of that, and all that they use.
    fn reached(&self, from: Resource) -> (BTreeSet<usize>, BTreeSet<Resource>) {
        let (mut jobs, mut resources) = (BTreeSet::new(), BTreeSet::new());
        let mut open = vec![from];
        while let Some(resource) = open.pop() {
            if !resources.insert(resource) {
                continue;
            }
            for user in &self.users[resource.0] {
                if jobs.insert(*user) {
                    open.extend(&self.job(*user).uses);
                }
            }
        }
        (jobs, resources)
    }

    fn job(&self, index: usize) -> &Job<W> {
        self.jobs[index].as_ref().expect("users have not ended")
    }

    /// Gives all jobs that a change reaches the rates that are fair now.
    fn share(&mut self) {
        while let Some(resource) = self.changed.first().copied() {
            let (jobs, resources) = self.reached(resource);
            self.changed.retain(|changed| !resources.contains(changed));
            let (mut first, mut ends) = (f64::INFINITY, Vec::new());
            for (index, rate) in self.fair(&jobs, &resources) {
                let now = self.now;
                let job = self.jobs[index].as_mut().expect("users have not ended");
                job.left = (job.left - job.rate * (now - job.since)).max(0.0);
                job.since = now;
                job.rate = rate;
                job.version += 1;
                let at = now + job.left / rate;
                if at < first - INSTANT {
                    ends.clear();
                }
                if at < first + INSTANT {
                    ends.push((index, job.version));
                    first = first.min(at);
                }
            }
            // What others leave nothing of goes on once one of them ends.
            if first.is_finite() {
                self.push(first, Kind::Ends(ends));
            }
        }
    }

    fn fair(&self, jobs: &BTreeSet<usize>, resources: &BTreeSet<Resource>) -> Vec<(usize, f64)> {
        // Sorted by resource, as the set is.
        let mut left: Vec<(Resource, f64, usize)> = resources
            .iter()
            .map(|resource| {
                let users = self.users[resource.0].len();
                (*resource, self.capacities[resource.0], users)
            })
            .collect();
        let mut open = jobs.clone();
        let mut rates = Vec::with_capacity(jobs.len());
        while !open.is_empty() {
            let full = left
                .iter()
                .filter(|(_, _, users)| *users > 0)
                .map(|(resource, left, users)| (*resource, left / *users as f64))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            let level = full.map_or(f64::INFINITY, |(_, share)| share);
            let mut fixed: Vec<(usize, f64)> = open
                .iter()
                .map(|index| (*index, self.job(*index).most))
                .filter(|(_, most)| *most <= level)
                .collect();
            if fixed.is_empty() {
                let (resource, share) = full.expect("a job that nothing limits");
                let users = self.users[resource.0].iter();
                fixed = users
                    .filter(|user| open.contains(user))
                    .map(|user| (*user, share))
                    .collect();
            }
            for (index, rate) in fixed {
                open.remove(&index);
                for resource in &self.job(index).uses {
                    let place = left.binary_search_by_key(resource, |(of, ..)| *of);
                    let (_, left, users) = &mut left[place.expect("it was reached")];
                    *left = (*left - rate).max(0.0);
                    *users -= 1;
                }
                rates.push((index, rate));
            }
        }
        rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(jobs: &[(f64, &[usize], f64)], capacities: &[f64]) -> Vec<f64> {
        let mut simulation = Simulation::new(vec![0.0; jobs.len()]);
        let made: Vec<Resource> = capacities
            .iter()
            .map(|capacity| simulation.resource(*capacity))
            .collect();
        for (index, (amount, uses, most)) in jobs.iter().enumerate() {
            let uses: Vec<Resource> = uses.iter().map(|place| made[*place]).collect();
            simulation.work(
                *amount,
                &uses,
                *most,
                move |simulation: &mut Simulation<Vec<f64>>| {
                    simulation.world[index] = simulation.now();
                },
            );
        }
        simulation.run();
        simulation.world
    }

    fn near(found: &[f64], wanted: &[f64]) {
        let all = found.iter().zip(wanted);
        assert!(
            found.len() == wanted.len() && all.clone().all(|(a, b)| (a - b).abs() < 1e-9),
            "{found:?} instead of {wanted:?}"
        );
    }

    #[test]
    fn jobs_of_one_resource_share_it_and_the_last_has_it_alone() {
        // Two at 5 each until the first has its 10, then the second's 10 more at 10.
        near(
            &ends(&[(10.0, &[0], 1e9), (20.0, &[0], 1e9)], &[10.0]),
            &[2.0, 3.0],
        );
    }

    #[test]
    fn a_job_that_can_take_little_leaves_the_rest_to_others() {
        near(
            &ends(&[(2.0, &[0], 1.0), (18.0, &[0], 1e9)], &[10.0]),
            &[2.0, 2.0],
        );
    }

    #[test]
    fn a_narrow_link_of_one_leaves_more_of_the_shared_link_to_others() {
        // One of three has a link of 1 besides: the others have 4.5 each of the shared 10.
        let jobs: &[(f64, &[usize], f64)] =
            &[(2.0, &[0, 1], 1e9), (9.0, &[0], 1e9), (9.0, &[0], 1e9)];
        near(&ends(jobs, &[10.0, 1.0]), &[2.0, 2.0, 2.0]);
    }

    #[test]
    fn jobs_of_different_resources_do_not_meet() {
        near(
            &ends(&[(10.0, &[0], 1e9), (10.0, &[1], 1e9)], &[10.0, 5.0]),
            &[1.0, 2.0],
        );
    }

    #[test]
    fn a_job_that_comes_later_takes_its_share_from_then_on() {
        let mut simulation = Simulation::new(Vec::new());
        let link = simulation.resource(10.0);
        let note = |simulation: &mut Simulation<Vec<f64>>| {
            let now = simulation.now();
            simulation.world.push(now);
        };
        simulation.work(20.0, &[link], 1e9, note);
        simulation.after(1.0, move |simulation| {
            simulation.work(5.0, &[link], 1e9, note)
        });
        simulation.run();
        // 10 in the first second, then 5 each in the second.
        near(&simulation.world, &[2.0, 2.5]);
    }
}
