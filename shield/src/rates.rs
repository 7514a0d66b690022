//! Message rates, per connection and per tenant.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};

use crate::Limits;

/// The limiters of all tenants that have a session.
pub(crate) struct Rates {
    connection: Quota,
    tenant: Quota,
    tenants: Mutex<HashMap<String, Arc<DefaultDirectRateLimiter>>>,
}

/// The limiters that one session must pass.
pub(crate) struct SessionRate {
    connection: DefaultDirectRateLimiter,
    tenant: Arc<DefaultDirectRateLimiter>,
    connection_burst: NonZeroU32,
    tenant_burst: NonZeroU32,
}

impl Rates {
    /// From checked limits.
    pub(crate) fn new(limits: &Limits) -> Self {
        let quota = |rate: u32, burst: u32| {
            Quota::per_second(NonZeroU32::new(rate).unwrap_or(NonZeroU32::MIN))
                .allow_burst(NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN))
        };
        Self {
            connection: quota(limits.connection_rate, limits.connection_burst),
            tenant: quota(limits.tenant_rate, limits.tenant_burst),
            tenants: Mutex::default(),
        }
    }

    /// The rate of a new session of `tenant`.
    pub(crate) fn session(&self, tenant: &str) -> SessionRate {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        // A tenant without a session that has its whole burst back needs no memory.
        tenants.retain(|_, limiter| {
            Arc::strong_count(limiter) > 1 || limiter.check_n(self.tenant.burst_size()).is_ok_and(|all| all.is_err())
        });
        let limiter = tenants.entry(tenant.to_owned()).or_insert_with(|| Arc::new(RateLimiter::direct(self.tenant)));
        SessionRate {
            connection: RateLimiter::direct(self.connection),
            tenant: limiter.clone(),
            connection_burst: self.connection.burst_size(),
            tenant_burst: self.tenant.burst_size(),
        }
    }
}

impl SessionRate {
    /// Takes `count` messages; more than a burst count as the whole burst.
    ///
    /// # Errors
    /// How long to wait until they can be taken.
    pub(crate) fn take(&self, count: u32) -> Result<(), Duration> {
        take(&self.connection, count, self.connection_burst)?;
        take(&self.tenant, count, self.tenant_burst)
    }
}

fn take(limiter: &DefaultDirectRateLimiter, count: u32, burst: NonZeroU32) -> Result<(), Duration> {
    let count = NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN).min(burst);
    match limiter.check_n(count) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(until)) => Err(until.wait_time_from(DefaultClock::default().now())),
        // Cannot be: the count is at most the burst.
        Err(_) => Err(Duration::from_secs(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(connection: u32, tenant: u32) -> Limits {
        Limits {
            connection_rate: connection,
            connection_burst: connection,
            tenant_rate: tenant,
            tenant_burst: tenant,
            ..Default::default()
        }
    }

    #[test]
    fn connections_share_their_tenant_s_rate_and_tenants_share_nothing() {
        let rates = Rates::new(&limits(10, 15));
        let (first, second, other) = (rates.session("a"), rates.session("a"), rates.session("b"));
        assert!(first.take(10).is_ok());
        assert!(first.take(1).is_err(), "its own rate is used up");
        assert!(second.take(10).is_err(), "only 5 are left of the tenant's");
        assert!(other.take(10).is_ok());
    }

    #[test]
    fn a_batch_over_the_burst_costs_the_whole_burst_but_passes() {
        let rates = Rates::new(&limits(10, 1_000));
        let session = rates.session("a");
        assert!(session.take(500).is_ok());
        let wait = session.take(1).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(100), "{wait:?}");
    }

    #[test]
    fn a_tenant_cannot_reset_its_rate_by_connecting_anew() {
        let rates = Rates::new(&limits(100, 10));
        assert!(rates.session("a").take(10).is_ok());
        assert!(rates.session("a").take(5).is_err());
    }
}
