/*! A recipe as the flags of a command line. */

use super::Recipe;
use super::built_in::{NAMES, built_in};

impl Recipe {
    /// The flags that resolve to this recipe: of the built-in recipes the one that differs in the fewest keys, then the keys
    /// that differ. None for the default recipe.
    pub fn flags(&self) -> Vec<String> {
        let own = self.to_table();
        let difference = |name: &'static str| {
            let base = built_in(name)?.to_table();
            let changed = own.iter().filter(|(key, value)| base.get(*key) != Some(*value));
            Some((name, changed.map(|(key, value)| assignment(key, value)).collect::<Vec<_>>()))
        };
        let nearest = NAMES.into_iter().filter_map(difference).min_by_key(|(_, keys)| keys.len());
        let (name, changed) = nearest.expect("there are built-in recipes");
        let base = (name != NAMES[0]).then(|| ["--recipe".to_owned(), name.to_owned()]);
        let set = changed.into_iter().flat_map(|change| ["--set".to_owned(), change]);
        base.into_iter().flatten().chain(set).collect()
    }
}

/// `KEY=VALUE`; a text stands without quotes.
fn assignment(key: &str, value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => format!("{key}={text}"),
        value => format!("{key}={value}"),
    }
}
