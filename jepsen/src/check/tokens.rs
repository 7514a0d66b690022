//! token-accepted: a token that must open nothing opened something. token-refused: a good one did not.

use super::Anomaly;
use crate::history::History;

/// The name of tokens that are good.
const GOOD: &str = "good";

pub(super) fn check(history: &History) -> Vec<Anomaly> {
    let wrong = history.accesses.iter().filter(|access| access.accepted != (access.token == GOOD));
    wrong
        .map(|access| {
            let (token, verb, process) = (&access.token, &access.verb, access.process);
            let (kind, did) =
                if access.accepted { ("token-accepted", "was let in") } else { ("token-refused", "was refused") };
            let detail = format!(
                "process {process} with a token that is {token} {did} to {verb} {} at {} ns",
                access.key, access.time
            );
            Anomaly::new(kind, &access.key, detail)
        })
        .collect()
}

/// Why the tries of a history prove nothing, if so.
pub(super) fn why_not_counted(history: &History) -> Option<String> {
    let tried = history.workloads.iter().any(|name| name == "tokens");
    let refused = history.accesses.iter().any(|access| !access.accepted);
    (tried && !refused).then(|| "no bad token was tried to the end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(token: &str, kind: &str) -> Vec<&'static str> {
        let text = format!(
            r#"{{"process":1,"type":"invoke","f":"access","key":"t/0","token":"{token}","verb":"publish","time":1}}
{{"process":1,"type":"{kind}","f":"access","key":"t/0","token":"{token}","verb":"publish","time":2}}
"#
        );
        let history = History::read(text.as_bytes()).unwrap();
        check(&history).iter().map(|anomaly| anomaly.kind).collect()
    }

    #[test]
    fn only_good_tokens_open_anything() {
        assert_eq!(kinds("expired", "fail"), [""; 0]);
        assert_eq!(kinds("expired", "ok"), ["token-accepted"]);
        assert_eq!(kinds("good", "ok"), [""; 0]);
        assert_eq!(kinds("good", "fail"), ["token-refused"]);
        assert_eq!(kinds("expired", "info"), [""; 0], "nobody was asked");
    }
}
