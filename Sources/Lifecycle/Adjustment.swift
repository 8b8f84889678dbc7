/// A change of a device that is served, by an operator: its backend does it, and nothing of the device's life depends on it.
package enum Adjustment: Hashable, Sendable {
  /// The cable of a network device is plugged in, or pulled.
  case link(isUp: Bool)
  /// A disk follows its image's size; a regular file grows to so many bytes first.
  case resize(bytes: UInt64?)

  package enum Outcome: Hashable, Sendable {
    case done(String)
    case failed(String)
  }

  /// What operators are told of it.
  func news(_ outcome: Outcome) -> DeviceEffect {
    switch (self, outcome) {
    case (.link, .done(let words)): .tell(.deviceLinkChanged, words)
    case (.link, .failed(let words)): .tell(.deviceLinkNotChanged, words)
    case (.resize, .done(let words)): .tell(.deviceResized, words)
    case (.resize, .failed(let words)): .tell(.deviceNotResized, words)
    }
  }
}
