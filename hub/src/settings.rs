//! [`Settings`]: where the hub and its cache are, and what is shown to it. The variables are those of Hugging Face's own tools.

use std::path::PathBuf;

use hf_hub::Cache;

/// How the hub is reached.
#[derive(Clone, Default)]
pub struct Settings {
    /// URL of the hub; `None`: huggingface.co.
    pub endpoint: Option<String>,
    /// The cache's folder; `None`: `.cache/huggingface/hub` in the home folder.
    pub cache: Option<PathBuf>,
    /// What is shown for private and gated repositories.
    pub token: Option<String>,
    /// Nothing is asked of the hub: the cache is all there is.
    pub offline: bool,
    /// No progress bars.
    pub quiet: bool,
}

impl Settings {
    /// What the environment says: `HF_ENDPOINT`, `HF_HUB_CACHE` or `HF_HOME`, `HF_TOKEN` or the token that `hf auth login` left,
    /// `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = text("HF_HOME").map(|home| PathBuf::from(home).join("hub"));
        let offline = text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value));
        let cache = text("HF_HUB_CACHE").map(PathBuf::from).or(home);
        Self {
            endpoint: text("HF_ENDPOINT"),
            cache,
            token: text("HF_TOKEN"),
            offline,
            quiet: text("HF_HUB_DISABLE_PROGRESS_BARS").is_some_and(|value| is_true(&value)),
        }
    }

    pub(crate) fn cache(&self) -> Cache {
        match &self.cache {
            Some(folder) => Cache::new(folder.clone()),
            None => Cache::default(),
        }
    }
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_not_shown() {
        let settings = Settings {
            token: Some("hf_secret".to_owned()),
            ..Settings::default()
        };
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn truth_has_several_words() {
        assert!(
            ["1", "true", "YES", " on "]
                .iter()
                .all(|word| is_true(word))
        );
        assert!(!["0", "", "false", "no"].iter().any(|word| is_true(word)));
    }
}
