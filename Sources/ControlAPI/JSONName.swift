package import JSON

/// Who speaks the control socket's protocol speaks JSON.
package typealias JSONValue = JSON.JSONValue
